"""``outgrow quickstart``: the whole way once, by the commands that a user would type, and what it came to."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import Opened, SiteOption, open_recipe

if TYPE_CHECKING:
    from outgrow.contracts import DatasetCard, StepRecord
    from outgrow.streaming.baselines import Baselines

_WORKERS = 2
_PROMPT = "def main():\n"


def quickstart(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Another recipe than the preset.")] = None,
    site: SiteOption = None,
) -> None:
    """Build a dataset from Python's own library, train a small Llama on 2 Ray workers, export it, and let it write."""
    path = recipe or Path(str(files("outgrow.recipes") / "presets" / "quickstart.yaml")).resolve()
    words = ["--site", str(site)] if site else []
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    opened = open_recipe(path, (), site)
    _command("plan", str(shown), "--workers", str(_WORKERS), *_fresh(opened), *words)
    _command("data", "build", str(shown), *words)
    _check_held_out(opened)
    _command("train", str(shown), "--workers", str(_WORKERS), *_fresh(opened), *words)
    card, folder = _trained(opened)
    name = folder.rpartition("/")[2]
    exported = Path(opened.site.cache) / "exports" / f"{name}-step-{_last_records(opened, folder)[0].step}"
    _command("export", name, str(exported), *words)
    _command("generate", str(exported), _PROMPT)
    typer.echo(_summary(opened, card, folder, exported))


def _command(*words: str) -> None:
    """Run one ``outgrow`` command as the user would see it; end with its exit code where it fails."""
    typer.echo(f"\n$ outgrow {shlex.join(words)}")
    code = subprocess.run([sys.executable, "-m", "outgrow", *words], check=False).returncode
    if code:
        raise typer.Exit(code)


def _check_held_out(opened: Opened) -> None:
    """The summary compares losses on held-out text. Raises ``DataError`` where the dataset has none."""
    from outgrow.errors import DataError
    from outgrow.streaming.build import find

    card = find(opened.recipe, opened.site)
    if card is not None and not card.validation_rows:
        raise DataError("no document is held out for validation", hint="raise data.validation_fraction, or add documents")


def _fresh(opened: Opened) -> list[str]:
    """``--fresh`` where an earlier version of outgrow, or of Python's library, made a run of this name from other rows."""
    from outgrow.cluster.runs import choose
    from outgrow.errors import RunError
    from outgrow.streaming.build import find

    card = find(opened.recipe, opened.site)
    try:
        if card is not None:
            choose(opened.site.open_storage(), opened.recipe, card.data_fingerprint, fresh=False)
    except RunError:
        return ["--fresh"]
    return []


def _trained(opened: Opened) -> tuple[DatasetCard, str]:
    """The dataset, and the folder of the run that the commands before have made."""
    from outgrow.cluster.runs import choose
    from outgrow.streaming.build import find

    card = find(opened.recipe, opened.site)
    assert card is not None
    run, _ = choose(opened.site.open_storage(), opened.recipe, card.data_fingerprint, fresh=False)
    return card, run.folder


# --- what it came to --------------------------------------------------------------------------------------------------


def _summary(opened: Opened, card: DatasetCard, folder: str, exported: Path) -> str:
    """A small table: unigram, bigram and model on the same held-out text, in nats a token and bits a byte."""
    storage = opened.site.open_storage()
    steps, validation = _last_records(opened, folder)
    baselines = _baselines(opened, card, folder, steps.step)
    model = validation.loss or float("nan")
    rows = [("unigram", baselines.unigram), ("bigram", baselines.bigram), ("model", model)]
    table = [f"  {name:<10}{loss:>14.3f}{baselines.bits_per_byte(loss):>16.3f}" for name, loss in rows]
    return "\n".join(
        [
            "",
            f"{'':12}{'nats a token':>14}{'bits a byte':>14}   on {baselines.targets:,} held-out tokens",
            *table,
            f"The model is {baselines.unigram - model:.2f} nats below the unigram after {steps.tokens:,} tokens.",
            "",
            f"  dataset   {storage.root_url}/{card.store}",
            f"  run       {storage.root_url}/{folder}",
            f"  exported  {exported}",
            "next: outgrow runs list; then a recipe of your own: docs/recipe.md",
        ]
    )


def _last_records(opened: Opened, folder: str) -> tuple[StepRecord, StepRecord]:
    """The last logged step and the last validation of the run."""
    from outgrow.monitoring.events import read_events

    newest = {record.kind: record for record in read_events(opened.site.open_storage(), folder)}
    return newest["step"], newest["validation"]


def _baselines(opened: Opened, card: DatasetCard, folder: str, steps: int) -> Baselines:
    """Fitted on the very rows that the run's steps consumed, measured on the rows that it validated on."""
    from transformers import PreTrainedTokenizerFast

    from outgrow.contracts import JobSpec, RunRef
    from outgrow.recipes.layout import resolve
    from outgrow.streaming.baselines import byte_lengths, measure, pairs
    from outgrow.streaming.fetch import local_dataset
    from outgrow.streaming.loader import build_loader, build_validation

    job = JobSpec(
        recipe=opened.recipe.to_dict(),
        site=opened.site.to_dict(),
        card=card,
        run=RunRef(name=opened.recipe.run.name, folder=folder, fingerprint=""),
        workers=1,
        threads_per_worker=1,
        device="cpu",
        launched=time.time(),
    )
    layout = resolve(opened.recipe, world=1, local_world=1)
    loader = build_loader(job, layout, 0, start_step=0, stop_step=steps)
    train = pairs(batch for rows in loader for batch in rows.micro_batches)
    loader.close()
    validation = pairs(batch for _, rows in build_validation(job, layout, 0) for batch in rows.micro_batches)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(local_dataset(opened.site, card) / "tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(list(range(card.vocab_size)))
    lengths = byte_lengths(tokens, frozenset(tokenizer.all_special_ids))
    return measure(train, validation, card.vocab_size, lengths)
