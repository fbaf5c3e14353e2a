from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.ranks import forking, small_config

TEXTS = ["Tell me a story about the sea.", "The sea is wide, and the story is long.\n"] * 20


@pytest.fixture(scope="session", autouse=True)
def forked_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process that has imported everything starts the ranks of all tests that only run them."""
    with forking(tmp_path_factory.mktemp("fork-server")):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More threads only slow products that are small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents of varying length, made from fixed words: the same on every machine."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = [f"{a}{b}" for a in ("alpha", "beta", "gamma", "delta") for b in "abcdefgh"]
    draw = random.Random(7)
    with path.open("w") as file:
        for _ in range(400):
            text = " ".join(draw.choices(words, k=draw.randint(4, 20)))
            file.write('{"text": "' + text + '"}\n')
    return path


@pytest.fixture(scope="session")
def initial_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved initial state that every parity run starts from."""
    folder = tmp_path_factory.mktemp("initial")
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "torch.manual_seed(0)\n"
        "config = AutoConfig.for_model(**json.loads(sys.argv[1]))\n"
        "model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)\n"
        # Larger weights than the default's 0.02 give gradients that tell scales apart.
        "[p.data.mul_(3) for p in model.parameters() if p.ndim > 1]\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, json.dumps(small_config()), str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=600,  # on a busy machine it waits for the others
    )
    return folder


@pytest.fixture(scope="session")
def trained_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE, trained once."""
    from autotune.runner.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    load_tokenizer(None, texts=lambda: TEXTS, vocab_size=400, save_dir=folder)
    return folder


@pytest.fixture
def tokenizer(trained_tokenizer: Path):
    """The small tokenizer, the test's own to change."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained_tokenizer)


@pytest.fixture
def write(tmp_path: Path):
    """Write a file from text, or from rows as JSON lines; return its path."""

    def write_file(name: str, content: str | list) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write_file
