"""``outgrow recipe``: check a recipe, and the JSON Schema of recipes for editors."""

from __future__ import annotations

import typer

from outgrow.cli.opening import OverridesArgument, RecipeArgument

app = typer.Typer(no_args_is_help=True, help="Check recipes.")


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Check RECIPE, with overrides KEY=VALUE, and show every mistake in it at once."""
    from outgrow.recipes.loading import load

    loaded = load(recipe, overrides or ())
    typer.echo(f"{recipe}: no mistakes; run {loaded.run.name}, {len(loaded.data.streams)} stream(s), seed {loaded.run.seed}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    import json

    from outgrow.recipes.reference import json_schema
    from outgrow.recipes.schema import Recipe

    typer.echo(json.dumps(json_schema(Recipe), indent=1))
