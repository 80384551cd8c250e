"""``outgrow site``: write a site file from what this machine has, and show the one in use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from outgrow.cli.opening import SiteOption

app = typer.Typer(no_args_is_help=True, help="Say where runs go on this machine.")


@app.command()
def init(
    site: Annotated[Path | None, typer.Option("--site", help="The file to write; else the one in the config folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented site.yaml from what this machine has."""
    import psutil

    from outgrow.cluster.inventory import take_inventory
    from outgrow.errors import SiteError
    from outgrow.recipes.site_init import init_site
    from outgrow.recipes.site_loading import user_site

    path = site or user_site()
    if path.exists() and not force:
        raise SiteError("there is a site file already", where=str(path), hint="--force replaces it; --site FILE writes another")
    mounts = [Path(disk.mountpoint) for disk in psutil.disk_partitions()]
    folders = [Path.home(), *(mount for mount in mounts if mount.is_dir() and os.access(mount, os.W_OK))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(init_site(take_inventory(folders), Path.home()))
    typer.echo(f"wrote {path}")


@app.command()
def show(site: SiteOption = None) -> None:
    """Show the site in use, with its secrets masked."""
    import yaml

    from outgrow.recipes.schema.options import without_credentials
    from outgrow.recipes.site_loading import find_site, load_site

    path = find_site(site, Path.cwd())
    typer.echo(f"# {path or 'built-in defaults; outgrow site init writes a file'}")
    data = load_site(path).model_dump(mode="json", by_alias=True)
    data["storage"] = without_credentials(data["storage"])
    for tier in data["tiers"]:
        tier["path"] = without_credentials(tier["path"])
    typer.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)
