"""One contender of ``peers.py`` in a process of its own: its own trainer and loader, stopped between steps by the script.

    python benchmarks/peers/contenders.py NAME '<settings as JSON>' READ_FD WRITE_FD

It writes ``ready`` once it is warm, and then, for each line that it reads, the seconds that one more optimizer step took and
the tokens of documents that were in it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1] / "tests")]

from outgrow.torchvision import ensure_importable  # noqa: E402

ensure_importable()

WARM_STEPS = 3
STEPS = 100_000
"""More than anybody waits for: the script ends the process."""
DOCUMENTS = 4000


class Gate:
    """Called once a step, always at the same place of it, with the tokens of the step that follows: there the process waits
    until its turn comes."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._turns, self._answers = os.fdopen(read_fd), os.fdopen(write_fd, "w")
        self._passed = 0
        self._start = 0.0
        self._tokens = 0.0

    def __call__(self, tokens: float) -> None:
        seconds = time.perf_counter() - self._start
        self._passed += 1
        if self._passed < WARM_STEPS:
            return
        print("ready" if self._passed == WARM_STEPS else f"{seconds} {self._tokens}", file=self._answers, flush=True)
        if not self._turns.readline():
            os._exit(0)
        self._tokens, self._start = tokens, time.perf_counter()


def rows_of(settings: dict[str, Any]) -> torch.Tensor:
    """Rows of random tokens, one more than a row is long."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 1000, (512, settings["length"] + 1), generator=generator)


def ragged(settings: dict[str, Any]) -> list[list[int]]:
    """Documents, their lengths evenly spread over the logarithm."""
    generator = torch.Generator().manual_seed(2)
    low, high = torch.tensor([settings["shortest"], settings["longest"]]).float().log().tolist()
    lengths = torch.empty(DOCUMENTS).uniform_(low, high, generator=generator).exp().round().int().tolist()
    return [torch.randint(1, 1000, (length,), generator=generator).tolist() for length in lengths]


def llama(settings: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**settings["model"], pad_token_id=None, bos_token_id=None, eos_token_id=0, use_cache=False)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def outgrow(settings: dict[str, Any], gate: Gate, folder: Path) -> None:
    """``train_worker`` as a run calls it: loader, loop, recording, schedule; saved and validated at its end alone."""
    import dataclasses

    import numpy as np
    from token_stores import make_dataset

    from outgrow.cluster.local import LocalContext
    from outgrow.recipes.loading import load
    from outgrow.streaming import loader as loading
    from outgrow.trainers.loop import train_worker

    length = settings["length"]
    tokens = ragged(settings) if "shortest" in settings else torch.randint(1, 1000, (40, 50 * length)).tolist()
    documents = [(np.array([*document[:-1], 0]), None) for document in tokens]
    dataset = make_dataset(folder, {"a": (documents, ())}, sequence_length=length, shard_bytes=1 << 22)
    overrides = [
        f"batch.rows={settings['rows']}",
        f"batch.micro_rows={settings['micro_rows']}",
        f"data.sequence_length={length}",
        f"compile={'blocks' if settings['compile'] else 'none'}",
        *(f"model.config.{key}={value}" for key, value in settings["model"].items() if key != "vocab_size"),
    ]
    job = dataset.job()
    job = dataclasses.replace(
        job,
        recipe=load(HERE / "outgrow.yaml", overrides).to_dict(),
        card=dataclasses.replace(job.card, vocab_size=settings["model"]["vocab_size"]),
        threads_per_worker=settings["threads"],
        site={**job.site, "monitoring": {**job.site["monitoring"], "stall_after_s": 86_400}},
    )
    build = loading.build_loader
    loading.build_loader = lambda *args, **options: _Gated(build(*args, **options), gate)  # type: ignore[assignment]
    (folder / job.run.folder).mkdir(parents=True)
    train_worker(job, LocalContext(rank=0, world=1, attempt="a", cause="", on_record=lambda record: None))


class _Gated:
    """A loader, with the gate between steps."""

    def __init__(self, loader: Any, gate: Gate) -> None:
        self._loader, self._gate = loader, gate

    def __iter__(self) -> Iterator[Any]:
        for rows in self._loader:
            self._gate(rows.tokens)
            yield rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def bare(settings: dict[str, Any], gate: Gate, folder: Path) -> None:
    """A loop as one writes it by hand."""
    rows, micro, chosen = rows_of(settings), settings["micro_rows"], settings["optimizer"]
    model = llama(settings).train()
    called = torch.compile(model) if settings["compile"] else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=chosen["lr"], weight_decay=chosen["weight_decay"], betas=tuple(chosen["betas"]), fused=True
    )
    for step in range(STEPS):
        gate(settings["rows"] * settings["length"])
        for part in range(settings["rows"] // micro):
            at = (step * settings["rows"] + part * micro) % (len(rows) - micro)
            batch = rows[at : at + micro]
            logits = called(input_ids=batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            (loss * micro / settings["rows"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()


def _training_arguments(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    chosen = settings["optimizer"]
    return dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=settings["micro_rows"],
        gradient_accumulation_steps=settings["rows"] // settings["micro_rows"],
        learning_rate=chosen["lr"],
        weight_decay=chosen["weight_decay"],
        adam_beta1=chosen["betas"][0],
        adam_beta2=chosen["betas"][1],
        max_grad_norm=chosen["clip_norm"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        torch_compile=settings["compile"],
        report_to="none",
        save_strategy="no",
        logging_steps=STEPS,
        disable_tqdm=True,
    )


def _gate_callback(gate: Gate, tokens: float) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate(tokens)

    return Callback()


def transformers(settings: dict[str, Any], gate: Gate, folder: Path) -> None:
    """transformers' Trainer over rows in memory; without an attention mask, so that sdpa takes its causal kernel."""
    from transformers import Trainer, TrainingArguments

    rows = rows_of(settings)[:, :-1]
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(
        model=llama(settings),
        args=TrainingArguments(**_training_arguments(settings, folder)),
        train_dataset=dataset,
        data_collator=lambda items: {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "labels")},
        callbacks=[_gate_callback(gate, rows[0].numel() * settings["rows"])],
    )
    trainer.train()


def litgpt(settings: dict[str, Any], gate: Gate, folder: Path) -> None:
    """litgpt's pretraining; it compiles the model by itself."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.pretrain import setup

    model, chosen, rows = settings["model"], settings["optimizer"], rows_of(settings)
    if not settings["compile"]:
        torch.compile = lambda module: module  # type: ignore[assignment]

    class Rows(DataModule):
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any) -> None:
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_size=self.batch_size, shuffle=True)  # type: ignore[arg-type]

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows[:8], batch_size=self.batch_size)  # type: ignore[arg-type]

    import contenders  # as litgpt imports it: this script is another module

    contenders.FusedAdamW.at_end = lambda: gate(settings["rows"] * settings["length"])
    setup(
        "peer",
        model_config=Config(
            name="peer",
            block_size=settings["length"],
            vocab_size=model["vocab_size"],
            padded_vocab_size=model["vocab_size"],
            n_layer=model["num_hidden_layers"],
            n_head=model["num_attention_heads"],
            n_query_groups=model["num_key_value_heads"],
            n_embd=model["hidden_size"],
            intermediate_size=model["intermediate_size"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        ),
        out_dir=folder,
        precision="32-true",
        data=Rows(),
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=settings["rows"],
            micro_batch_size=settings["micro_rows"],
            max_tokens=STEPS * settings["rows"] * settings["length"],
            max_norm=chosen["clip_norm"],
            lr_warmup_steps=10,
        ),
        eval=EvalArgs(interval=STEPS, max_iters=1),
        optimizer={
            "class_path": "contenders.FusedAdamW",
            "init_args": {"lr": chosen["lr"], "weight_decay": chosen["weight_decay"], "betas": chosen["betas"]},
        },
        devices=1,
        logger_name="csv",
    )


class FusedAdamW(torch.optim.AdamW):
    """litgpt asks for the fused kernel on GPUs alone; it is as much faster on a CPU. The gate is where a step ends."""

    at_end: Callable[[], None]

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "betas": tuple(settings["betas"]), "fused": True})

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        type(self).at_end()
        return found


def trl(settings: dict[str, Any], gate: Gate, folder: Path) -> None:
    """TRL's SFTTrainer with best-fit-decreasing packing; documents are kept apart by their positions."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<end>": 0, **{str(number): number for number in range(1, settings["model"]["vocab_size"])}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<end>")), eos_token="<end>", pad_token="<end>"
    )
    trainer = SFTTrainer(
        model=llama(settings),
        args=SFTConfig(
            **_training_arguments(settings, folder), packing=True, packing_strategy="bfd", max_length=settings["length"]
        ),
        train_dataset=Dataset.from_dict({"input_ids": ragged(settings)}),
        processing_class=tokenizer,
    )
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    trainer.add_callback(_gate_callback(gate, settings["rows"] * sum(lengths) / len(lengths)))
    trainer.train()


CONTENDERS: dict[str, Callable[[dict[str, Any], Gate, Path], None]] = {
    "outgrow": outgrow,
    "bare": bare,
    "transformers": transformers,
    "litgpt": litgpt,
    "trl": trl,
}


def main(name: str, settings: dict[str, Any], read_fd: int, write_fd: int) -> None:
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        CONTENDERS[name](settings, Gate(read_fd, write_fd), Path(folder))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
