"""Host memory does not grow with the data: built from files several times as large as the bound."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

MIB = 2**20
READER = """
import json, sys
from pathlib import Path
import numpy as np
from autotune.runner.data import build_sequences
from autotune.runner.data.loader import RankLoader, StepOrder
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Workload
from autotune.trial.protocol import ModelSource, Request

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def build(path, kind):
    request = Request(
        launch_id="x", mode="train", plan={}, device="cpu", out_dir="unused",
        model=ModelSource(name="x", config={"vocab_size": 4000}, tokenizer=sys.argv[1]),
        workload=Workload(seq_len=512, global_batch_size=8),
        datasets=[DatasetSource(path=path, type=kind)],
    )
    return build_sequences(request, Path(sys.argv[2]))

build(sys.argv[3], sys.argv[5])  # a small one first: imports and first uses are not the data's
Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
before = status("VmRSS")
data = build(sys.argv[4], sys.argv[5])
loader = RankLoader(
    data.train, StepOrder(len(data.train), 8, seed=0), micro_batch_size=8, grad_accum_steps=1,
    dp_rank=0, dp_size=1,
)
for _, batch in zip(range(len(data.train) // 8), loader):
    assert len(batch["input_ids"]) == 8
tokens = sum(source.tokens for source in data.counts.train)
print(json.dumps({"growth": status("VmHWM") - before, "tokens": tokens}))
"""


@pytest.fixture(scope="module")
def words() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 9))) for _ in range(2000)]


@pytest.fixture(scope="module")
def word_tokenizer(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotune.runner.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("words") / "bpe"
    load_tokenizer(None, texts=lambda: [" ".join(words)] * 3, vocab_size=4000, save_dir=folder)
    return folder


def write_rows(path: Path, kind: str, size: int, words: list[str]) -> None:
    """Write `size` bytes of rows: one MiB of them over and over."""
    draw = random.Random(1)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    def row() -> str:
        if kind == "completion":
            return json.dumps({"text": text(300, 1000)})
        roles = ("user", "assistant") * 2
        talk = [{"role": role, "content": text(10, 60)} for role in roles]
        return json.dumps({"messages": talk})

    block: list[str] = []
    while sum(map(len, block)) < min(size, MIB):
        block.append(row())
    with path.open("w") as file:
        separator, end = ",\n", "]"
        if path.suffix == ".json":
            file.write("[")
        else:
            separator, end = "\n", "\n"
        number = -(-size // MIB)
        for index in range(number):
            file.write(separator.join(block) + (end if index == number - 1 else separator))


@pytest.mark.parametrize(
    ("kind", "suffix", "size", "bound"),
    [
        ("completion", ".jsonl", 16 * MIB, 12 * MIB),
        pytest.param("completion", ".jsonl", 160 * MIB, 32 * MIB, marks=pytest.mark.slow),
        pytest.param("completion", ".json", 96 * MIB, 32 * MIB, marks=pytest.mark.slow),
        pytest.param("chat_template", ".jsonl", 96 * MIB, 32 * MIB, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)
def test_peak_growth_stays_under_a_bound_below_the_file(
    kind: str,
    suffix: str,
    size: int,
    bound: int,
    words: list[str],
    word_tokenizer: Path,
    tmp_path: Path,
) -> None:
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    write_rows(small, kind, MIB // 4, words)
    write_rows(large, kind, size, words)
    assert large.stat().st_size > size > bound
    command = [sys.executable, "-c", READER, str(word_tokenizer), str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, str(small), str(large), kind],
        check=True,
        capture_output=True,
        text=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {size / MIB:.0f} MiB: {measured['growth'] / MIB:.1f} MiB, {measured}")
    # In memory, tokens and mask would take 5 bytes each: as much as the bound or more.
    assert 5 * measured["tokens"] > bound
    assert measured["growth"] < bound
