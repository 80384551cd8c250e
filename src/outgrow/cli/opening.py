"""What every command opens first: the recipe, and the site that it will run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from outgrow.contracts import DatasetCard
    from outgrow.recipes.schema import Recipe
    from outgrow.recipes.schema.site import Site

RecipeArgument: TypeAlias = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file.", show_default=False)]
OverridesArgument: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to override.", show_default=False),
]
SiteOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--site", help="The site file; else ./site.yaml, else the one in the config folder.", show_default=False),
]
WorkersOption: TypeAlias = Annotated[
    int | None, typer.Option("--workers", min=1, help="Ranks; else what the site says.", show_default=False)
]
FreshOption: TypeAlias = Annotated[bool, typer.Option("--fresh", help="Start a new run; the old one is kept.")]
AcceptOption: TypeAlias = Annotated[
    bool, typer.Option("--accept", help="Resume although keys have changed that alter the rest of the run.")
]

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checked recipe and the site bound to it: every name that the recipe uses is a folder or URL in ``site.sources``."""

    recipe: Recipe
    site: Site
    recipe_path: Path

    def with_site(self, **changes: Any) -> Opened:
        """The same with keys of the site changed, as by an option of the command line that has checked them."""
        return replace(self, site=self.site.model_copy(update=changes))


def open_recipe(path: Path, overrides: Sequence[str] | None = None, site_path: Path | None = None) -> Opened:
    """The recipe at ``path`` with ``key=value`` overrides, and its site.

    Raises ``RecipeError`` or ``SiteError`` with every problem of that file at once.
    """
    from outgrow.recipes.loading import load
    from outgrow.recipes.site_loading import bind

    recipe = load(path, overrides or ())
    return Opened(recipe=recipe, site=bind(open_site(site_path), recipe, path), recipe_path=path)


def open_site(site_path: Path | None = None) -> Site:
    """The site that ``--site`` names, else the working folder's, else the user's, else the built-in defaults."""
    from outgrow.recipes.site_loading import find_site, load_site

    return load_site(find_site(site_path, Path.cwd()))


def built_card(opened: Opened) -> DatasetCard:
    """The card of the recipe's dataset. Raises ``DataError`` where it is not built."""
    from outgrow.errors import DataError
    from outgrow.streaming.build import find

    found = find(opened.recipe, opened.site)
    if found is None:
        raise DataError(
            "its dataset is not built", where=str(opened.recipe_path), hint=f"outgrow data build {opened.recipe_path}"
        )
    return found
