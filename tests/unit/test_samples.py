"""Prompts continued along the way: what a slow twin writes, the same on all ranks, and training none the wiser.

Run as a script it is one rank of two: ``python tests/unit/test_samples.py RANK FOLDER``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import LENGTH, VOCAB, Case, born_engine, rows_of_steps, trained_steps
from tokenizers import Tokenizer, models, pre_tokenizers

from outgrow.processes import end_rank
from outgrow.trainers.samples import continue_prompts

EOS = 0
PROMPTS = ("w5 w6 w7 w8", "w1", "", " ".join(f"w{n % VOCAB}" for n in range(1, LENGTH + 1)), "w9 w12 w15", "w40 w41")
STEPS = 6


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def run(case: Case, rank: int, num_tokens: int) -> dict[str, Any]:
    """Losses of some steps, with prompts continued after each where ``num_tokens`` is not 0, and what was written last."""
    engine = born_engine(case)
    losses, said = list[tuple[float, float]](), list[dict[str, str]]()
    torch.manual_seed(5)
    for step, figures in enumerate(trained_steps(engine, case, rank, rows_of_steps()[:STEPS])):
        losses.append(figures)
        if num_tokens:
            before = torch.get_rng_state()
            said = continue_prompts(engine, tokenizer(), PROMPTS, num_tokens + step % 2, LENGTH, EOS)
            assert torch.equal(torch.get_rng_state(), before)
    return {"losses": losses, "said": said}


def test_training_with_prompts_is_bit_for_bit_training_without() -> None:
    case = Case(engine="plain", micro_rows=3, precision="fp32")
    assert run(case, 0, 9)["losses"] == run(case, 0, 0)["losses"]


def test_every_text_is_what_the_slow_twin_writes() -> None:
    """One prompt at a time, without padding, the model called by itself."""
    case = Case(engine="plain", micro_rows=8, precision="fp64")
    engine = born_engine(case)
    for _ in trained_steps(engine, case, 0, rows_of_steps()[:STEPS]):
        pass
    for num_tokens in (1, 12):
        said = continue_prompts(engine, tokenizer(), PROMPTS, num_tokens, LENGTH, EOS)
        assert [each["prompt"] for each in said] == list(PROMPTS)
        for prompt, each in zip(PROMPTS, said, strict=True):
            if prompt and len(prompt.split()) < LENGTH:
                expected = slowly(engine, prompt, num_tokens)
                assert each == {"prompt": prompt, "text": "".join(f" w{n}" for n in expected)}
        assert said[2]["problem"] == "the prompt has no token"
        assert said[3] == {
            "prompt": PROMPTS[3],
            "text": "",
            "problem": f"the prompt has {LENGTH} tokens, which leaves no room in 24",
        }


def slowly(engine: Any, prompt: str, num_tokens: int) -> list[int]:
    ids, made = [int(word[1:]) for word in prompt.split()], list[int]()
    while len(made) < num_tokens and len(ids) + len(made) < LENGTH:
        with torch.no_grad():
            logits = engine._model.eval()(input_ids=torch.tensor([ids + made])).logits[0, -1]
        if (token := int(logits.argmax())) == EOS:
            break
        made.append(token)
    return made


class Scripted:
    """An engine that always finds the next token likeliest, counted modulo 7."""

    calls = 0

    def logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert ((segments == -1) | (segments == 0)).all() and (segments[:, -1] == 0).all()
        return torch.nn.functional.one_hot((token_ids[:, -1] + 1) % 7, VOCAB).float()


def test_all_ranks_make_as_many_passes_wherever_a_text_ends() -> None:
    engine: Any = Scripted()
    said = continue_prompts(engine, tokenizer(), ["w3", "w6", "w1 w2"], 10, LENGTH, EOS)
    assert [each["text"] for each in said] == [" w4 w5 w6", "", " w3 w4 w5 w6"]
    assert engine.calls == 10


def test_two_ranks_of_fsdp2_say_the_same_and_train_as_without_prompts(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["with"]["losses"] == first["without"]["losses"]
    assert first["with"]["said"] == run(Case(engine="plain", precision="fp64"), 0, 9)["said"]


def _main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    case = Case(engine="fsdp2", shard=2, micro_rows=2, precision="fp64")
    found = {"with": run(case, rank, 9), "without": run(case, rank, 0)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    end_rank(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
