"""Damaged configurations are read or refused in words, never with a traceback.

Each is made from a file of `tests/conformance/axolotl` by a seed, so a failure can be repeated:
its number is the seed.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from autotune.cli import main
from autotune.config import load_config
from autotune.emit.run_config import emit_run_config
from autotune.errors import AutotuneError
from autotune.resources import data_dir
from tests.unit.config_mutations import damage_structure, damage_text, dump

FILES = Path(__file__).resolve().parents[1] / "conformance" / "axolotl"
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(FILES.glob("*.yml"))]
VALUES = [yaml.safe_load(text) for text in TEXTS]
PRESETS = [
    json.loads(entry.read_text("utf-8"))
    for entry in sorted(data_dir("deepspeed_configs").iterdir(), key=lambda entry: entry.name)
    if entry.name.endswith(".json")
]
NUMBER_OF_FILES = 1000
NUMBER_OF_JSONS = 300
BATCH = 100
BASE = "base_model: tiny-qwen3\nlearning_rate: 1e-4\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the DeepSpeed files that the configurations name."""
    (tmp_path / "deepspeed").symlink_to(FILES / "deepspeed")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damaged(seed: int) -> str:
    draw = random.Random(seed)
    at = draw.randrange(len(TEXTS))
    if draw.random() < 0.6:
        return dump(damage_structure(VALUES[at], draw))
    return damage_text(TEXTS[at], draw)


def damaged_json(seed: int) -> str:
    draw = random.Random(seed)
    preset = draw.choice(PRESETS)
    if draw.random() < 0.7:
        return json.dumps(damage_structure(preset, draw), default=str, skipkeys=True)
    return damage_text(json.dumps(preset, indent=1), draw)


def read_all(cases: Iterator[tuple[int, str]], path: Path) -> dict[str, int]:
    """Read each, write what was read and read that again; any other error than ours fails."""
    counts = {"read": 0, "refused": 0}
    for seed, text in cases:
        path.write_text(text, encoding="utf-8")
        try:
            config = load_config(path)
        except AutotuneError as error:
            assert error.exit_code == 2 and 20 < len(str(error)) < 3000, f"seed {seed}: {error}"
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} breaks load_config:\n{text[:3000]}") from error
        else:
            counts["read"] += 1
            again = path.with_name("again.yml")
            again.write_text(emit_run_config(config), encoding="utf-8")
            # As text, because a NaN among the kept keys is not equal to itself.
            assert repr(load_config(again)) == repr(config), f"seed {seed}"
    return counts


@pytest.mark.parametrize("first", range(0, NUMBER_OF_FILES, BATCH))
def test_damaged_files(folder, first):
    cases = ((seed, damaged(seed)) for seed in range(first, first + BATCH))
    counts = read_all(cases, folder / "config.yml")
    # Both must happen, or the damage is too small or too great to tell anything.
    assert counts["read"] >= 5 and counts["refused"] >= 30


def test_damaged_deepspeed_files(folder):
    (folder / "config.yml").write_text(BASE + "deepspeed: mine.json\n")
    counts = {"read": 0, "refused": 0}
    for seed in range(NUMBER_OF_JSONS):
        text = damaged_json(seed)
        (folder / "mine.json").write_text(text, encoding="utf-8")
        try:
            load_config(folder / "config.yml")
            counts["read"] += 1
        except AutotuneError:
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} breaks load_config:\n{text[:3000]}") from error
    assert min(counts.values()) >= 30


@pytest.fixture
def fresh_log(monkeypatch):
    """The command line's handler keeps the stream it was made with: make it anew in this test."""
    logger = logging.getLogger("autotune")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)


@pytest.mark.parametrize("verb", ["estimate", "train"])
def test_the_command_line_ends_in_words(folder, fresh_log, capsys, verb):
    """`train` meets the output folder of another run, so that no rank ever starts."""
    held = folder / "held"
    held.mkdir()
    (held / "config.json").write_text("{}")
    more = {
        "estimate": ["--gpus", "8", "--gpu-type", "h100-sxm"],
        "train": ["--gpus", "2", "--device", "cpu", "--output-dir", str(held)],
    }[verb]
    codes = set()
    for seed in range(0, NUMBER_OF_FILES, 40):
        (folder / "config.yml").write_text(damaged(seed), encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            main([verb, str(folder / "config.yml"), *more])
        told = capsys.readouterr().err
        assert ended.value.code in (0, 1, 2), f"seed {seed}"
        assert "Traceback" not in told and "internal error" not in told, f"seed {seed}: {told}"
        assert ended.value.code == 0 or told.strip(), f"seed {seed} says nothing"
        codes.add(ended.value.code)
    assert 2 in codes
