"""What ranks of each engine allocate at each instant of a step, against the composed estimate."""

import subprocess
import sys
from pathlib import Path

import pytest

from autotune.memory import estimate_memory
from autotune.memory.setup import setup_of
from autotune.memory.table import CPU_ALLOCATOR_OVERHEAD
from autotune.plan import Recompute
from autotune.spec.hardware import load_hardware
from autotune.spec.model import model_from_config
from autotune.spec.workload import Lora, Workload
from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import REQUEST_FILE, write_message
from tests.integration.ranks import make_plan, small_config, trial_request

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.integration,
    # Names of transformers 5.17, deprecated in 5.23.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory"
CONFIG = small_config(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
SPEC = model_from_config("small", CONFIG)
WORKLOAD = Workload(seq_len=128, global_batch_size=8, packing=False)
INSTANTS = ("forward", "forward_end", "loss", "backward", "optimizer_step")
TOLERANCE = 0.05
"""Vectors and what kernels work in are left out, more of such a small model than of others."""

SEQUENCES = {"micro_batch_size": 8, "bucket_elements": 2**14}
ACCUMULATED = {"micro_batch_size": 4, "grad_accum_steps": 2, "bucket_elements": 2**14}
QUICK = [
    (make_plan("zero2", 2, **SEQUENCES), WORKLOAD),
    (make_plan("fsdp2", 2, **ACCUMULATED), WORKLOAD),
]
LORA = WORKLOAD.model_copy(update={"adapter": Lora(r=16)})
PACKED = WORKLOAD.model_copy(update={"packing": True})
SLOW = [
    (make_plan("ddp", 2, **ACCUMULATED), WORKLOAD),
    (make_plan("zero1", 2, **ACCUMULATED), PACKED),
    (make_plan("zero2_offload_optimizer", 2, **SEQUENCES), WORKLOAD),
    (make_plan("zero3", 2, recompute=True, **SEQUENCES), PACKED),
    (make_plan("zero3_offload_params", 2, **ACCUMULATED), WORKLOAD),
    (make_plan("zero3", 2, **SEQUENCES), LORA),
    (make_plan("fsdp2_no_reshard", 2, recompute=True, **SEQUENCES), WORKLOAD),
    (make_plan("fsdp2_offload", 2, **SEQUENCES), PACKED),
    (make_plan("fsdp2", 2, cp=2, **SEQUENCES), WORKLOAD),
    (make_plan("fsdp2", 2, **SEQUENCES), LORA),
    (make_plan("hsdp", 4, **SEQUENCES), WORKLOAD),
]


def run(cases, folder, monkeypatch):
    """Train two steps of each case; return what was measured, by case."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    from ranks_measured import measured_row

    folders = []
    for number, (plan, workload) in enumerate(cases):
        own = folder / str(number)
        own.mkdir()
        request = trial_request(plan, own, rungs=[(1, 1)], workload=workload)
        request = request.model_copy(
            update={"model": request.model.model_copy(update={"config": CONFIG})}
        )
        build_native_ops(request, own)
        write_message(request, own / REQUEST_FILE)
        folders.append(own)
    worker = [sys.executable, str(BENCHMARK / "ranks_worker.py"), *map(str, folders)]
    variables = rank_environment(request, folder, "ranks", 1) | {"PYTHONSAFEPATH": ""}
    done = subprocess.run(worker, env=variables, capture_output=True, text=True, timeout=600)
    logs = "\n".join(f.read_text()[-2000:] for f in folder.glob("*/rank-*.log"))
    assert done.stdout.count("\tok\t") == len(cases), done.stdout + done.stderr[-2000:] + logs
    return [
        measured_row(plan.describe(), own, plan.world_size)
        for own, (plan, _) in zip(folders, cases, strict=True)
    ]


def estimates(cases):
    from autotune.runner.trace.profiles import trace_profiles

    hardware = [load_hardware("cpu", plan.world_size) for plan, _ in cases]
    setups = [
        setup_of(SPEC, workload, plan, ranks)
        for (plan, workload), ranks in zip(cases, hardware, strict=True)
    ]
    keys = list(dict.fromkeys(setup.key for setup in setups))
    profiles = dict(zip(keys, trace_profiles(CONFIG, keys), strict=True))
    return [
        estimate_memory(SPEC, workload, plan, ranks, profile=profiles[setup.key])
        for (plan, workload), ranks, setup in zip(cases, hardware, setups, strict=True)
    ]


def errors(plan, found, measured):
    """Return the errors of all instants, as shares of what was measured."""
    later = [f"later_{name}" for name in INSTANTS[:-1]] if plan.grad_accum_steps > 1 else []
    return {
        name: found.instants[name] / (1 + CPU_ALLOCATOR_OVERHEAD) / measured[name] - 1
        for name in (*INSTANTS, *later)
    }


def check(cases, folder, monkeypatch):
    measured = run(cases, folder, monkeypatch)
    wrong = {
        (plan.describe(), bool(workload.adapter), instant): round(error, 4)
        for (plan, workload), found, row in zip(cases, estimates(cases), measured, strict=True)
        for instant, error in errors(plan, found, row).items()
        if abs(error) > TOLERANCE
    }
    assert not wrong


def test_engines(tmp_path, monkeypatch):
    check(QUICK, tmp_path, monkeypatch)


@pytest.mark.slow
def test_more_engines(tmp_path, monkeypatch):
    assert any(plan.recompute is Recompute.FULL for plan, _ in SLOW)
    check(SLOW, tmp_path, monkeypatch)
