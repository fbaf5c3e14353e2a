"""Real ranks that run out of memory in loading, in evaluation and in saving say where it was."""

from __future__ import annotations

import io
import json
import resource
import threading
import time
from pathlib import Path

import pytest

from autotune.ladder import ladder_below, train_down
from autotune.spec.hardware import detect_hardware
from autotune.spec.model import model_from_config
from autotune.spec.workload import Precision, Workload
from autotune.trial.checkpoint import is_whole
from autotune.trial.processes import tagged_processes
from tests.integration.ranks import forking_starter, make_plan, small_config, training_request

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # several starts of ranks, most cold
CONFIG = small_config(vocab_size=8192)
WORKLOAD = Workload(seq_len=64, global_batch_size=8, precision=Precision.FP32)
ROOM = 64 * 2**20
"""A step of four sequences takes some 20 MiB; the logits of 60 sequences alone 126 MiB."""


def trained(folder: Path, corpus: Path, starter, **settings):
    """Train on one rank, which the test troubles; return how it ended and what was said."""
    plan = make_plan("ddp", 1, micro_batch_size=4, grad_accum_steps=2)
    request = training_request(
        plan, folder, data=corpus, workload=WORKLOAD, config=CONFIG, learning_rate=1e-3, **settings
    )
    model = model_from_config("small", CONFIG)
    ladder = ladder_below(plan, model, WORKLOAD, detect_hardware(1, "cpu"))
    assert ladder.rungs, "there is somewhere to go"
    out = io.StringIO()
    return train_down(request, ladder, out, starter), out.getvalue()


def little_room(run: Path) -> None:
    """Leave the first launch's rank little room to grow, once it has a checkpoint."""
    launch, ends = run / "launches/0001", time.monotonic() + 200
    while not is_whole(run / "checkpoint-2") and time.monotonic() < ends:
        time.sleep(0.01)
    for pid in tagged_processes("AUTOTUNE_LAUNCH_DIR", str(launch.resolve())):
        status = Path(f"/proc/{pid}/status").read_text()
        taken = int(status.partition("VmData:")[2].split()[0]) * 1024
        resource.prlimit(pid, resource.RLIMIT_DATA, (taken + ROOM, resource.RLIM_INFINITY))


def test_evaluation_that_does_not_fit_goes_on_with_a_smaller_batch_of_its_own(
    tmp_path: Path, corpus: Path
) -> None:
    squeeze = threading.Thread(target=little_room, args=[tmp_path], daemon=True)
    squeeze.start()
    ended, said = trained(
        tmp_path, corpus, forking_starter(), max_steps=24, save_steps=2, save_total_limit=2,
        eval_steps=23, val_set_size=60, eval_batch_size=60,
    )  # fmt: skip
    assert ended.message == "", ended.message
    squeeze.join()
    assert "Out of memory in evaluation. Next: eval_batch_size 30 instead of 60" in said
    (step,) = ended.document["ladder"]
    assert step["plan"]["micro_batch_size"] == 4, "what is trained stays what it was"
    assert ended.document["steps"] == 24


REFUSING = """\
import os, sys

def refuse(event, args):
    if event == "{event}" and isinstance(args[0], str) and "{part}" in args[0]:
        raise MemoryError("refused by the test")

if os.environ.get("RANK"):
    sys.addaudithook(refuse)
"""


@pytest.mark.parametrize(
    ("event", "part", "phase", "advice"),
    [
        ("open", "start-weights/", "load", "No rung further down loads less."),
        ("os.mkdir", "checkpoint-4", "save", "Saving takes the same whatever the micro batch"),
    ],
)
def test_a_phase_in_which_no_rung_helps_ends_the_run(
    tmp_path: Path,
    corpus: Path,
    initial_state: Path,
    monkeypatch: pytest.MonkeyPatch,
    event: str,
    part: str,
    phase: str,
    advice: str,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REFUSING.format(event=event, part=part))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = tmp_path / "run"
    state = tmp_path / "start-weights"
    if phase == "load":
        state.symlink_to(initial_state)
        config = {"weights": state}
    else:
        config = {}
    ended, _ = trained(run, corpus, None, max_steps=6, save_steps=2, **config)
    written = json.loads((run / "run.json").read_text())
    assert (written["outcome"], written["stopped_in"]) == ("oom", phase), ended
    assert ended.document["ladder"] == [] and ended.advice.startswith(advice)
    assert len(list((run / "launches").iterdir())) == 1, "it is not tried again"
    if phase == "save":
        assert ended.advice.endswith(f"last checkpoint, {run / 'checkpoint-2'}.")
