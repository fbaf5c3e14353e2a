"""What the supervisor writes for the ranks (`Request`) and what every rank answers (`RankResult`).

Both are JSON files, written to a temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from autotune.plan import Plan
from autotune.spec.training import DatasetSource, DataSettings, TrainSettings
from autotune.spec.workload import Workload
from autotune.trial.data_counts import DataCounts

SCHEMA_VERSION: Final = 1
REQUEST_FILE = "request.json"
LOG_FILE = "log.jsonl"
STARTED_VARIABLE = "AUTOTUNE_STARTED_S"
"""Environment variable of the ranks: `time.monotonic()` at their launch's start, of this host."""


class Outcome(StrEnum):
    """How one configuration's trial ended."""

    OK = "ok"
    OOM = "oom"
    """The device's memory, or the stated limit, was not enough."""
    HOST_OOM = "host_oom"
    """The kernel killed a rank for host memory."""
    TIMEOUT = "timeout"
    """The deadline passed while the ranks were still making progress."""
    HANG = "hang"
    """A rank stopped, or no rank made progress for a long while."""
    CRASHED = "crashed"
    INVALID = "invalid"
    """What ran is not what was asked for."""
    THRASH = "thrash"
    """It ran so near the limit that the allocator had to retry; never a winner."""
    INTERRUPTED = "interrupted"


class Phase(StrEnum):
    """What a rank is at: how it died means something else in each."""

    LOAD = "load"
    """From its start until the first step: imports, data, model, engine, checkpoint."""
    STEP = "step"
    EVALUATE = "evaluate"
    SAVE = "save"
    """A checkpoint, or the final weights."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelSource(_Message):
    """Which model the ranks build."""

    name: str
    """What the user called it."""
    config: dict[str, Any]
    """The Hugging Face config, complete with `model_type`."""
    weights: str | None = None
    """Folder with pretrained weights; None builds random weights from the config."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; None trains a byte-level BPE on the data."""


class Rung(_Message):
    """One micro batch of a ladder, with the accumulation its full run would have."""

    micro_batch_size: int = Field(ge=1)
    grad_accum_steps: int = Field(ge=1)


class RungOrder(_Message):
    """What the supervisor asks next of ranks that converse; see `Request.converses`."""

    launch_id: str
    rung: Rung | None
    """None ends the launch."""
    give_up_step_s: float | None = None
    """The rung may end early once its step, at the plan's accumulation, is surely longer."""


class Measurement(_Message):
    """How long a rung measures; see `autotune.trial.steps` for the rule."""

    warmup_steps: int = 1
    """Optimizer steps not counted, at each accumulation; more where steps still get faster."""
    min_steps: int = 3
    max_steps: int = 20
    """Optimizer steps after the warm-up at each accumulation."""
    max_direct_accumulation: int = 4
    """An accumulation up to this is measured as it is; above, it is composed from 1 and 2."""
    target_seconds: float = 4.0
    """A rung's accumulation stops counting after `min_steps` steps once this time has passed."""
    target_relative_interval: float = 0.02
    """It stops before that once half the 95% interval of its median step is this share of it."""


class Request(_Message):
    """Everything a rank needs to know."""

    schema_version: Literal[1] = SCHEMA_VERSION
    launch_id: str
    """One launch's own: `run_launch` makes it so, and reads no result that says another."""
    mode: Literal["trial", "train"]
    model: ModelSource
    plan: dict[str, Any]
    """`Plan.to_dict()`; in a trial the first rung replaces its micro batch and accumulation."""
    workload: Workload
    device: Literal["cuda", "cpu"]
    out_dir: str
    """Folder of this launch: request, results, logs. In train mode the run's output folder."""
    rungs: list[Rung] = Field(default_factory=list)
    converses: bool = False
    """The ranks take one `RungOrder` after another from `rung_file` instead of `rungs`."""
    rehearses: bool = False
    """A trial as a confirmation: every row is filled to its end, the plan's own accumulation is
    measured whatever it is, and one evaluation step and one checkpoint follow; see `Rehearsal`."""
    idle_limit_s: float = 1800.0
    """How long ranks that converse wait for the next order before they give up."""
    measurement: Measurement = Field(default_factory=Measurement)
    memory_limit_bytes: int | None = None
    """Per rank. CUDA: the allocator's fraction. CPU: RLIMIT_DATA above what the imports took."""
    datasets: list[DatasetSource] = Field(default_factory=list)
    """Empty in a trial means synthetic documents."""
    test_datasets: list[DatasetSource] = Field(default_factory=list)
    data: DataSettings = Field(default_factory=DataSettings)
    train: TrainSettings | None = None
    seed: int = 42

    def plan_object(self) -> Plan:
        """Return the plan as its type."""
        return Plan.from_dict(self.plan)


class RungResult(_Message):
    """What one rank measured at one micro batch. Times are this rank's, device-synchronised."""

    micro_batch_size: int
    outcome: Outcome
    message: str = ""
    accumulations: list[AccumulationResult] = Field(default_factory=list)
    cut_short: bool = False
    """It ended before its time, being surely slower than `RungOrder.give_up_step_s`."""
    wall_s: float = 0.0
    """From the rung's begin to its end, warm-up included."""


class AccumulationResult(_Message):
    """Counted optimizer steps at one accumulation; a list entry a step unless it says otherwise."""

    grad_accum_steps: int
    step_s: list[float]
    """Whole optimizer step, data loading and bookkeeping included."""
    micro_step_s: list[float]
    """Every micro-step without gradient synchronisation: `(grad_accum_steps - 1)` a step."""
    sync_micro_step_s: list[float]
    """The last micro-step of each step, which synchronises gradients."""
    optimizer_step_s: list[float]
    """Clipping, optimizer step, zeroing."""
    valid_tokens: list[int]
    """Tokens with a label that the step read, summed over all ranks."""
    warmup_s: list[float] = Field(default_factory=list)
    """Steps before those counted, slowest rank."""
    mean_step_tokens: float
    """What `valid_tokens` would be if every sequence held as many as the data's average."""
    peak_allocated_bytes: int
    """CUDA: the allocator's peak. CPU: growth of the resident set's peak since the imports."""
    peak_reserved_bytes: int
    """CUDA: the allocator's reserved peak. CPU: the larger of that and the growth of VmData."""
    alloc_retries: int = 0
    device_used_bytes: int | None = None
    """CUDA: taken on the whole device, as NVML counts it."""
    device_total_bytes: int | None = None
    """CUDA: what the device has."""


class Rehearsal(_Message):
    """What a full run does besides steps, done once after them, as one rank saw it."""

    evaluation_s: float
    """One evaluation step: a micro batch on every data-parallel rank."""
    save_s: float
    """One checkpoint: weights, optimizer, state."""
    checkpoint_bytes: int
    """What all ranks of the host wrote."""
    peak_allocated_bytes: int
    """Of evaluation and checkpoint; see `AccumulationResult`."""
    peak_reserved_bytes: int


class RankError(_Message):
    """Why a rank stopped."""

    outcome: Outcome
    message: str
    traceback: str
    time_s: float
    """`time.monotonic()`: one clock for all ranks of a host, so the earliest is the root cause."""
    user_mistake: bool = False
    """The rank met bad input, such as wrong dataset columns: every launch would meet it again."""


class RankResult(_Message):
    """One rank's answer; rewritten after each rung, `complete` only at the very end."""

    schema_version: Literal[1] = SCHEMA_VERSION
    launch_id: str
    rank: int
    world_size: int
    complete: bool = False
    asserted: dict[str, Any] = Field(default_factory=dict)
    """What was checked after prepare: engine, stage, placements, groups, attention."""
    rungs: list[RungResult] = Field(default_factory=list)
    error: RankError | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    start: Literal["cold", "fork"] = "cold"
    imports_s: float | None = None
    """From the launch's start until everything was imported."""
    ready_s: float | None = None
    """From the launch's start to the start of the first step."""
    baseline_bytes: int = 0
    """Memory taken before the model: CPU VmData after the imports, CUDA context."""
    phase: Phase = Phase.LOAD
    """What the rank was at when it last wrote; a failed one, what it failed in."""
    data: DataCounts | None = None
    """What was read; None with synthetic documents."""
    rehearsal: Rehearsal | None = None
    """Of a request that rehearses."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Train mode: final metrics."""


def rank_result_file(rank: int | Literal["*"]) -> str:
    """Return the name of a rank's result file in the launch folder, or a pattern for every rank."""
    return f"rank-{rank}.result.json"


def heartbeat_file(rank: int | Literal["*"]) -> str:
    """Return the name of the file whose time says when a rank last made progress, or a pattern."""
    return f"rank-{rank}.heartbeat"


def rung_file(number: int | Literal["*"]) -> str:
    """Return the name of the file with a conversation's order `number`, counted from 1."""
    return "rung-*.json" if number == "*" else f"rung-{number:04d}.json"


_M = TypeVar("_M", bound=BaseModel)


def write_message(message: BaseModel, path: Path) -> None:
    """Write a message atomically: a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(message.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_message(kind: type[_M], path: Path) -> _M:
    """Read a message.

    Raises:
        pydantic.ValidationError: not a message of this kind and schema version.
        FileNotFoundError: no such file.
    """
    return kind.model_validate_json(path.read_bytes())
