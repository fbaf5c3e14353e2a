"""Helpers that start real ranks: build requests, run them, read what they logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autotune.plan import Engine, Plan, Recompute
from autotune.spec.training import DatasetSource, TrainSettings
from autotune.spec.workload import Workload
from autotune.trial.forkserver import ForkServer
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import LOG_FILE, Measurement, ModelSource, Outcome, Request, Rung

LIMITS = Limits(deadline_s=240, hang_s=120)
_SERVERS: list[ForkServer] = []


def small_config(**changes: Any) -> dict[str, Any]:
    """A two-layer Qwen3 with 8 query and 4 key-value heads: enough for SP 4."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    } | changes


def make_plan(strategy: str, world: int, *, cp: int = 1, tp: int = 1, **changes: Any) -> Plan:
    """Return the plan of a strategy file's name over `world` ranks."""
    dp = world // (cp * tp)
    values: dict[str, Any] = {"strategy": strategy, "cp": cp, "tp": tp}
    if strategy == "ddp":
        values |= {"engine": Engine.DDP, "dp_replicate": dp}
    elif strategy.startswith("zero"):
        values |= {
            "engine": Engine.DEEPSPEED,
            "zero_stage": int(strategy[4]),
            "dp_shard": dp,
            "offload_optimizer": "offload" in strategy,
            "offload_params": strategy.endswith("offload_params"),
        }
    elif strategy == "hsdp":
        values |= {"engine": Engine.FSDP2, "dp_replicate": 2, "dp_shard": dp // 2}
    else:
        values |= {
            "engine": Engine.FSDP2,
            "dp_shard": dp,
            "reshard_after_forward": strategy != "fsdp2_no_reshard",
            "offload_params": strategy == "fsdp2_offload",
            "offload_optimizer": strategy == "fsdp2_offload",
        }
    if changes.pop("recompute", False):
        values["recompute"] = Recompute.FULL
    return Plan(**(values | changes))


def training_request(
    plan: Plan,
    folder: Path,
    *,
    data: Path,
    workload: Workload,
    config: dict[str, Any] | None = None,
    weights: Path | None = None,
    **settings: Any,
) -> Request:
    return Request(
        launch_id=folder.name,
        mode="train",
        model=ModelSource(
            name="small", config=config or small_config(), weights=str(weights) if weights else None
        ),
        plan=plan.to_dict(),
        workload=workload,
        device="cpu",
        out_dir=str(folder),
        datasets=[DatasetSource(path=str(data), type="completion")],
        train=TrainSettings(
            **({"lr_scheduler": "constant", "save_final_weights": False} | settings)
        ),
    )


def trial_request(
    plan: Plan, folder: Path, *, rungs: list[tuple[int, int]], **changes: Any
) -> Request:
    values = {
        "launch_id": folder.name,
        "mode": "trial",
        "model": ModelSource(name="small", config=small_config()),
        "plan": plan.to_dict(),
        "workload": Workload(seq_len=64, global_batch_size=8),
        "device": "cpu",
        "out_dir": str(folder),
        "rungs": [Rung(micro_batch_size=b, grad_accum_steps=a) for b, a in rungs],
        "measurement": Measurement(min_steps=2, max_steps=3, target_seconds=0.2),
    }
    return Request(**(values | changes))


def run(request: Request, limits: Limits = LIMITS, **options: Any) -> Ended:
    folder = Path(request.out_dir)
    build_native_ops(request, folder)
    return run_launch(request, folder, limits, **options)


@contextmanager
def forking(folder: Path) -> Iterator[None]:
    """Let `run_well` fork its ranks meanwhile, as a search does: a cold start takes longer."""
    # pytest says in the environment which test runs.
    with ForkServer(folder, ignored=frozenset({"PYTEST_CURRENT_TEST"})) as server:
        _SERVERS.append(server)
        yield
        _SERVERS.remove(server)


def forking_starter() -> ForkServer | None:
    """Return what forks the ranks inside `forking`."""
    return _SERVERS[-1] if _SERVERS else None


def run_well(request: Request) -> Ended:
    """Run to the end, or fail the test with the rank's last words."""
    # One thread a rank, however many ranks: another environment would start the server anew.
    forked = {"starter": _SERVERS[-1], "environment": {"OMP_NUM_THREADS": "1"}} if _SERVERS else {}
    ended = run(request, **forked)
    logs = "\n".join(
        log.read_text(errors="replace")[-2000:] for log in Path(request.out_dir).glob("rank-*.log")
    )
    assert ended.outcome is Outcome.OK, f"{ended.message}\n{logs}"
    return ended


def logged(folder: Path | str, key: str) -> list[float]:
    """Return one value of every logged line that has it."""
    lines = (Path(folder) / LOG_FILE).read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]
