from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.ranks import small_config


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
    import json

    subprocess.run(
        [sys.executable, "-c", script, json.dumps(small_config()), str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    return folder
