"""A run that meets out-of-memory in the middle goes on a rung lower, as if it had begun there."""

from __future__ import annotations

import io
import resource
import threading
import time
from pathlib import Path

import pytest

from autotune.ladder import ladder_below, train_down
from autotune.plan import Recompute
from autotune.spec.hardware import detect_hardware, load_hardware
from autotune.spec.model import model_from_config
from autotune.spec.workload import Precision, Workload
from autotune.trial.checkpoint import is_whole
from autotune.trial.processes import tagged_processes
from tests.integration.ranks import (
    forking_starter,
    logged,
    make_plan,
    run_well,
    small_config,
    training_request,
)

pytestmark = pytest.mark.integration
STEPS = 24


class Squeeze(threading.Thread):
    """Lets the ranks of a run's first launch grow no more, once it has a whole checkpoint."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self.run_folder = run
        self.squeezed: list[int] = []
        self.at_step = 0

    def run(self) -> None:
        launch = self.run_folder / "launches/0001"
        ends = time.monotonic() + 200
        while not is_whole(self.run_folder / "checkpoint-2"):
            if time.monotonic() > ends:
                return
            time.sleep(0.01)
        for pid in tagged_processes("AUTOTUNE_LAUNCH_DIR", str(launch.resolve())):
            resource.prlimit(pid, resource.RLIMIT_DATA, (2**20, resource.RLIM_INFINITY))
            self.squeezed.append(pid)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_an_oom_in_mid_run(
    strategy: str, tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    workload = Workload(seq_len=64, global_batch_size=8, precision=Precision.FP32)
    settings = {
        "data": corpus, "workload": workload, "weights": initial_state, "max_steps": STEPS,
        "save_steps": 2, "learning_rate": 1e-3, "save_total_limit": 2,
    }  # fmt: skip
    plan = make_plan(strategy, 2, micro_batch_size=4, grad_accum_steps=1)
    request = training_request(plan, tmp_path / "squeezed", **settings)
    ladder = ladder_below(
        plan, model_from_config("small", small_config()), workload, detect_hardware(2, "cpu")
    )
    squeeze = Squeeze(Path(request.out_dir))
    squeeze.start()
    out = io.StringIO()
    ended = train_down(request, ladder, out, forking_starter())
    squeeze.join()
    assert len(squeeze.squeezed) == 2, "the limit was put on both ranks"
    assert ended.message == "" and ended.document["steps"] == STEPS, ended
    (step,) = ended.document["ladder"]
    assert step["change"] == "micro batch 2 instead of 4" and step["freed_bytes"] > 0
    text = out.getvalue()
    assert "Out of memory. Next: micro batch 2 instead of 4" in text
    resumed = int(text.partition("goes on from checkpoint-")[2].partition(".")[0])
    assert 2 <= resumed < STEPS

    lower = make_plan(strategy, 2, micro_batch_size=2, grad_accum_steps=2)
    whole = training_request(lower, tmp_path / "whole", **settings)
    run_well(whole)
    losses = logged(request.out_dir, "loss")
    assert len(losses) == STEPS and losses[0] - losses[-1] > 0.5
    assert losses == pytest.approx(logged(whole.out_dir, "loss"), abs=1e-5)


@pytest.mark.slow
def test_recompute_and_offload_read_the_checkpoint(
    tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    """The last rung of FSDP2: a run that goes on there has the losses of one that stays."""
    plan = make_plan("fsdp2", 2, micro_batch_size=2, grad_accum_steps=2)
    settings = {
        "data": corpus, "weights": initial_state, "max_steps": 6, "learning_rate": 1e-3,
        "workload": Workload(seq_len=64, global_batch_size=8, precision=Precision.FP32),
    }  # fmt: skip
    whole = training_request(plan, tmp_path / "whole", **settings, save_steps=3)
    run_well(whole)
    losses = logged(whole.out_dir, "loss")
    lowest = ladder_below(
        plan, model_from_config("small", small_config()), settings["workload"],
        load_hardware("h100-sxm", 2),
    ).rungs[-1]  # fmt: skip
    assert lowest.offload_params and lowest.recompute is Recompute.FULL
    resumed = training_request(
        lowest, tmp_path / "lower", **settings, resume_from=str(tmp_path / "whole/checkpoint-3")
    )
    run_well(resumed)
    assert logged(resumed.out_dir, "loss") == pytest.approx(losses[3:], abs=1e-5)
    assert losses[3] - losses[5] > 1e-3, "a run that stood still would agree with anything"
