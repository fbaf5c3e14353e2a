"""FSDP1 files of every form: migrated by the command, trained on real ranks, looked at.

tests/conformance/test_migrate_axolotl_schema.py gives the same files to Axolotl's own schema, and
tests/conformance/test_migrate_accelerate.py to accelerate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.commands import autotune
from tests.integration.ranks import logged
from tests.unit.migrate_forms import ACCELERATE, AXOLOTL, COMMON, Form

pytestmark = pytest.mark.integration
QUICK = ("list-and-prefixed",)
STEPS = 3


def migrate(form: Form, text: str, folder: Path) -> Path:
    """Migrate a file as a person does, in place; what it warned of is compared."""
    path = folder / "config.yml"
    path.write_text(text)
    done = autotune("migrate", str(path), "--in-place", *form.flags)
    assert done.returncode == 0, done.stderr
    for words in form.said:
        assert words in done.stderr
    assert (folder / "config.yml.bak").read_text() == text
    again = autotune("migrate", str(path), "--in-place")
    assert (again.returncode, again.stdout) == (0, ""), "a second run changes nothing"
    return path


def train(config: Path, folder: Path, corpus: Path, form: Form) -> dict[str, Any]:
    """Train it on CPU ranks and return what the run wrote down of itself."""
    done = autotune(
        "train", str(config), "--gpus", str(form.ranks), "--device", "cpu", "--data", str(corpus),
        "--output-dir", str(folder / "out"), "--max-steps", str(STEPS), "--learning-rate", "3e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FSDP1" not in done.stderr, "the file says FSDP2 now"
    losses = logged(folder / "out", "loss")
    assert len(losses) == STEPS and losses[-1] < losses[0]
    return json.loads((folder / "out" / "run.json").read_text())


def check(form: Form, document: dict[str, Any], folder: Path) -> None:
    """Compare what ran with what the FSDP1 file trained.

    The ranks compare the prepared model with the plan of their request (reshard, offload, wrapped
    and recomputed layers) and stop at a difference; so the plan says what they found.
    """
    asserted = document["asserted"]
    assert asserted["engine"] == "fsdp2"
    mesh = {"world": form.ranks, "shard": 2}
    placement = "(Shard(dim=0),)"
    if form.copies > 1:
        mesh["replicate"] = form.copies
        placement = "(Replicate(), Shard(dim=0))"
    assert asserted["groups"] == mesh
    assert list(asserted["placements"]) == [placement]
    request = json.loads((folder / "out" / "launches" / "0001" / "request.json").read_text())
    plan = request["plan"]
    assert plan["reshard_after_forward"] is form.reshard
    assert plan["offload_params"] is plan["offload_optimizer"] is form.offload
    assert (plan["recompute"] == "full") is form.recompute
    assert (plan["dp_replicate"], plan["dp_shard"]) == (form.copies, 2)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in AXOLOTL]
)
def test_axolotl_s(name: str, tmp_path: Path, corpus: Path) -> None:
    form = AXOLOTL[name]
    path = migrate(form, COMMON + form.text, tmp_path)
    assert "fsdp" not in yaml.safe_load(path.read_text())
    check(form, train(path, tmp_path, corpus, form), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_s(name: str, tmp_path: Path, corpus: Path) -> None:
    """Its file says how ranks are laid out, so `import` makes a whole configuration of it."""
    form = ACCELERATE[name]
    path = migrate(form, form.text, tmp_path)
    run = tmp_path / "run.yml"
    done = autotune(
        "import", str(path), "--model", "tiny-qwen3", "--seq-len", "64",
        "--micro-batch-size", "2", "--grad-accum-steps", "1", "--out", str(run),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(form, train(run, tmp_path, corpus, form), tmp_path)
