"""What rendering costs beside tokenising: dialogues through ``Renderer.encode`` against raw ``encode_batch`` of the same texts.

    python benchmarks/render_rate.py --rounds 9

Dialogues of 1 to 5 questions and answers, some with a system prompt, whose messages are pieces of Python's library of 40 to
600 characters; a byte-level tokenizer of 4,000 tokens trained on it; one thread. Raw is the encoder alone on the finished
renderings, ids taken out of it. Each round does both in turn; times are CPU seconds of the process. Then borders of sentences
in tokens drawn at random, and every step of cleaning on Russian prose.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from text_recipes import make_recipe, make_site  # noqa: E402

from outgrow.recipes.schema.streams import CleanStep  # noqa: E402
from outgrow.streaming.borders import SentenceBorders  # noqa: E402
from outgrow.streaming.cleaning import Cleaner  # noqa: E402
from outgrow.streaming.render import Rendered, Renderer, prepare_tokenizer, template_text  # noqa: E402
from outgrow.streaming.sources.document import Dialogue, Document  # noqa: E402
from outgrow.streaming.tokenizer import TextTokenizer, train  # noqa: E402

BATCH = 100
STEPS = ("nfc", "control_characters", "hyphenation", "line_joins", "filler_words", "time_codes", "look_alikes")
PROSE = (
    "Он вошёл, огляделся и, ничего не сказав, сел у окна. За окном шёл дождь, и было слышно, как он стучит по крыше;\n"
    "— Что-то случилось? — спросила она тихо. В 1995 году они жили в Санкт-Петербурге (на Васильевском острове), в 10:30.\n\n"
)


def dialogues(text: str, count: int) -> list[Document]:
    draw = random.Random(0)

    def content() -> str:
        length = draw.randint(40, 600)
        start = draw.randrange(len(text) - length)
        return text[start : start + length]

    made = []
    for number in range(count):
        messages = [{"role": "system", "content": content()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 5)):
            messages += [{"role": role, "content": content()} for role in ("user", "assistant")]
        made.append(Document(content=Dialogue(messages=tuple(messages)), source=str(number)))
    return made


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def render_rates(text: str, bare: Path, name: str, rounds: int) -> str:
    stream = {
        "name": "chat",
        "source": {"kind": "jsonl", "path": "x", "shape": {"kind": "messages"}},
        "chat": {"template": {"kind": "named", "name": name}},
    }
    data, site = make_recipe(stream).data, make_site(bare.parent)
    prepare_tokenizer(bare, data, site)
    tokenizer = TextTokenizer(bare)
    renderer = Renderer(tokenizer, data.streams[0], template_text(data.streams[0], site, bare))
    documents = dialogues(text, 800)
    made = renderer.encode(documents)
    texts = [tokenizer.decode(item.tokens) for item in made if isinstance(item, Rendered)]
    raw = tokenizers.Tokenizer.from_file(str(bare / "tokenizer.json"))

    def encode() -> None:
        for start in range(0, len(texts), BATCH):
            for encoding in raw.encode_batch(texts[start : start + BATCH], add_special_tokens=False):
                encoding.ids  # noqa: B018  (a copy into Python's integers)

    def render() -> None:
        for start in range(0, len(documents), BATCH):
            renderer.encode(documents[start : start + BATCH])

    pairs = [(seconds(encode), seconds(render)) for _ in range(rounds)]
    shares = [before / after for before, after in pairs]
    chars = sum(map(len, texts))
    rates = [chars / min(column) / 1e6 for column in zip(*pairs, strict=True)]
    return (
        f"| {name} | {rates[0]:.2f} | {rates[1]:.2f} | {rates[1] / rates[0]:.2f} | "
        f"{statistics.median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}, numpy {np.__version__}")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))[:100]]
    with tempfile.TemporaryDirectory() as root:
        print("| template | raw, M chars/s | rendered, M chars/s | of the best | of each round, median (range) |")
        print("|---|---|---|---|---|")
        for name in ("chatml", "llama3", "mistral", "saiga"):
            bare = Path(root) / name / "tokenizer"
            bare.parent.mkdir()
            train(texts, 4000, bare)
            print(render_rates("".join(texts), bare, name, rounds))
        borders = SentenceBorders(TextTokenizer(bare))
    tokens = np.random.default_rng(0).integers(0, 4000, 10_000_000).astype(np.uint16)
    print(f"borders: {10 / min(seconds(lambda: borders.find(tokens)) for _ in range(rounds)):.0f} M tokens/s")
    prose = PROSE * 8000
    for step in STEPS:
        own = Cleaner([TypeAdapter(CleanStep).validate_python({"kind": step})])
        print(f"{step}: {len(prose) / min(seconds(lambda: own(prose)) for _ in range(3)) / 1e6:.0f} M chars/s")  # noqa: B023


if __name__ == "__main__":
    main()
