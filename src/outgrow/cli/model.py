"""``outgrow model``, ``outgrow export``, ``outgrow generate``: families, and what a run has learned."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from outgrow.cli.opening import SiteOption, open_recipe, open_site

if TYPE_CHECKING:
    from outgrow.cluster.runs import StoredRun
    from outgrow.recipes.schema.site import Site

app = typer.Typer(no_args_is_help=True, help="Check families of models.")


@app.command()
def check(
    family: Annotated[
        str,
        typer.Argument(
            metavar="FAMILY_OR_RECIPE", help="A model_type of transformers, or a recipe that uses it.", show_default=False
        ),
    ],
    site: SiteOption = None,
) -> None:
    """Run the probes of a tested family on FAMILY, and remember here when it has passed them all."""
    import tempfile

    from outgrow.errors import ModelError
    from outgrow.trainers.models.checked import remember
    from outgrow.trainers.models.probes import run_probes
    from outgrow.trainers.models.tiny import tiny_config

    model_type, keys, opened = _family(family, site)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="outgrow-check-") as folder:
        for outcome in run_probes(tiny_config(model_type, keys), Path(folder)):
            failed += not outcome.passed
            typer.echo(f"{outcome.probe:<16}{'passed' if outcome.passed else 'FAILED':<8}{outcome.detail}")
    if failed:
        raise ModelError(f"{model_type} failed {failed} of the probes and stays refused", where="model.family")
    remember(model_type, Path(opened.cache).expanduser())
    typer.echo(f"{model_type} has passed and may be trained on this machine")


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name: its newest run.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; else the newest.", show_default=False)] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint with the lowest validation loss, as checkpoint.best_by says.")
    ] = False,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="Of the weights; else bf16 for a bf16 run, fp32 for others.", show_default=False),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Of a run with an adapter: the whole model, with the adapter worked in.")
    ] = False,
    merge_into: Annotated[
        Literal["original", "4-bit"],
        typer.Option(help="With --merged: the base as its folder has it, or as the run computed with it in 4 bits."),
    ] = "original",
    site: SiteOption = None,
) -> None:
    """Make FOLDER a Hugging Face model with the weights of a checkpoint of RUN, or a peft adapter where RUN trained one."""
    from outgrow.cluster.runs import find_run
    from outgrow.trainers.export_run import export_run

    opened = open_site(site)
    stored = find_run(opened.open_storage(), run)
    if best:
        step = _best_step(opened, stored, step)
    if merge_into != "original" and not merged:
        raise typer.BadParameter("goes with --merged: without it the adapter is exported alone", param_hint="--merge-into")
    manifest = export_run(
        stored.ref,
        _with_model_folder(opened, stored.file.recipe["model"]),
        folder,
        step=step,
        dtype=dtype,
        merge_into=merge_into if merged else None,
    )
    size = sum((folder / name).stat().st_size for name in manifest.files)
    kind = "" if manifest.kind == "model" else f"{manifest.kind}, "
    typer.echo(
        f"{folder}: {manifest.run} at step {manifest.step}, {kind}{manifest.parameters:,} parameters in {manifest.dtype}, "
        f"{len(manifest.files)} files, {size / 1e6:,.1f} MB"
    )


def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model.", show_default=False)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is more varied.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this probability together.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
) -> None:
    """Write text that follows PROMPT, as the model in FOLDER goes on."""
    import torch

    from outgrow.trainers.generate import generate as pieces

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = pieces(folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, device=device)
    typer.echo(prompt, nl=False)
    for text in made:
        typer.echo(text, nl=False)
    typer.echo()


def _family(family: str, site: Path | None) -> tuple[str, dict[str, Any], Site]:
    """The ``model_type``, the keys of its configuration, and the site."""
    if not family.endswith((".yaml", ".yml")):
        return family, {}, open_site(site)
    from outgrow.errors import ModelError
    from outgrow.recipes.schema.model import ArchitectureModel, CustomModel

    opened = open_recipe(Path(family), (), site)
    model = opened.recipe.model
    if isinstance(model, ArchitectureModel):
        return model.family, dict(model.config), opened.site
    if isinstance(model, CustomModel):
        raise ModelError("a custom model is probed at every start of its runs", where=family, hint=f"outgrow train {family}")
    from outgrow.recipes.placed import weights_folder
    from outgrow.trainers.models.build import folder_config

    config = folder_config(weights_folder(opened.site, model.path))
    known = inspect.signature(type(config)).parameters
    return config.model_type, {key: value for key, value in config.to_diff_dict().items() if key in known}, opened.site


def _best_step(site: Site, stored: StoredRun, step: int | None) -> int:
    """The step of the run's best checkpoint. Raises ``RunError`` where there is none, or ``step`` was given too."""
    from outgrow.errors import RunError
    from outgrow.trainers.checkpoint.retention import best_checkpoint

    if step is not None:
        raise RunError(f"--best was given beside --step {step}; allowed: one of the two")
    metric = stored.file.recipe["checkpoint"].get("best_by", "total")
    return best_checkpoint(site.open_storage(), stored.ref.folder, metric).step


def _with_model_folder(site: Site, model: dict[str, Any]) -> Site:
    """The site, which knows the folder that a run began with: by its own name for it, else relative to the working folder."""
    if model["kind"] != "folder" or model["path"] in site.sources:
        return site
    return site.model_copy(update={"sources": {**site.sources, model["path"]: str(Path.cwd() / model["path"])}})
