"""The words and figures every report shares, so that console and page say the same."""

from __future__ import annotations

import re
from typing import Any

from autotune.plan import Plan
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.units import format_bytes, format_duration

NOT_MEASURED = "\N{EM DASH}"
COMPOSED_MARK = "*"
COMPOSED_NOTE = (
    f"{COMPOSED_MARK} composed: the plan's own accumulation was not run; its step is the sum of "
    "measured micro-steps and one measured optimizer step."
)

OUTCOME_WORDS = {
    Outcome.OK: "ok",
    Outcome.OOM: "out of memory",
    Outcome.HOST_OOM: "host out of memory",
    Outcome.TIMEOUT: "too slow, deadline passed",
    Outcome.HANG: "hung",
    Outcome.CRASHED: "crashed",
    Outcome.INVALID: "ran something else",
    Outcome.THRASH: "too near the limit",
    Outcome.INTERRUPTED: "interrupted",
}

OUTCOME_ADVICE = {
    Outcome.OOM: "Raise --memory-limit if the device has more, use more GPUs, a shorter --seq-len, "
    "--adapter lora, or strategies with offload.",
    Outcome.HOST_OOM: "The host ran out of memory: fewer ranks a host, or strategies without "
    "offload.",
    Outcome.TIMEOUT: "The steps were slower than the deadline allows: a smaller "
    "--global-batch-size, or look for another job on these devices.",
    Outcome.HANG: "A rank stopped making progress: see the launch's log folder and the links "
    "between the devices.",
    Outcome.CRASHED: "Read the traceback in the launch's log folder; the same error in every "
    "launch is a matter of the installation or the model.",
    Outcome.INVALID: "What ran was not the plan: a library fell back without saying so. The reason "
    "names what ran.",
    Outcome.THRASH: "The allocator had to retry: raise --memory-limit or use more GPUs.",
    Outcome.INTERRUPTED: "The search was stopped: the same command in the same --out goes on.",
}

# Terminal sequences (CSI and OSC) and control characters; a rank's message can hold any of them.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def clean(text: object) -> str:
    """Return text without terminal sequences and control characters, newlines and tabs kept."""
    return _CONTROL.sub("", str(text))


def first_line(text: str, width: int = 160) -> str:
    """Return the first line that says something, cut to `width` characters."""
    lines = (line.strip() for line in clean(text).splitlines())
    line = next((line for line in lines if line), "")
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def plan_name(plan: dict[str, Any]) -> str:
    """Return the plan's short name; of a plan this version does not know, what it can read."""
    try:
        return Plan.from_dict(plan).describe()
    except (KeyError, TypeError, ValueError):
        known = ("strategy", "micro_batch_size", "grad_accum_steps")
        return clean(" ".join(f"{key}={plan[key]}" for key in known if key in plan)) or "plan"


def is_composed(record: TrialRecord) -> bool:
    """Tell whether `step_s` was put together instead of measured at the plan's accumulation."""
    if record.step_s is None:
        return False
    return record.plan.get("grad_accum_steps") not in record.measured_accum_steps


def memory_bytes(record: TrialRecord) -> int | None:
    """Return what one rank took, as the limit counts it: reserved where known, else allocated."""
    if record.peak_reserved_bytes is not None:
        return record.peak_reserved_bytes
    return record.peak_allocated_bytes


def rate(tokens_per_s: float | None, composed: bool = False) -> str:
    """Write tokens a second with at least three significant figures; a star when composed."""
    if tokens_per_s is None:
        return NOT_MEASURED
    digits = 0 if tokens_per_s >= 100 else 1 if tokens_per_s >= 10 else 2
    return f"{tokens_per_s:,.{digits}f}" + COMPOSED_MARK * composed


def size(num_bytes: float | None) -> str:
    """Write bytes, or a dash for what was not measured."""
    return NOT_MEASURED if num_bytes is None else format_bytes(num_bytes)


def predicted_interval(record: TrialRecord) -> str:
    """Return the 90% interval of memory that a trial was given before it ran."""
    low, high = record.predicted_low_bytes, record.predicted_high_bytes
    if low is None or high is None:
        return NOT_MEASURED
    return f"{format_bytes(low)} to {format_bytes(high)}"


def predicted_verdict(record: TrialRecord) -> str:
    """Return what was said of a trial before it ran; of an older study the verdict alone."""
    if record.predicted_verdict is None:
        return NOT_MEASURED
    name = clean(record.predicted_verdict).lower().replace("_", " ")
    chance = record.predicted_fit_probability
    return name if chance is None else f"{chance:.0%}, {name}"


def seconds(value: float | None, composed: bool = False) -> str:
    """Write seconds with three significant figures below a minute."""
    if value is None:
        return NOT_MEASURED
    if value < 1:
        text = f"{_three_figures(value * 1000)} ms"
    elif value < 60:
        text = f"{_three_figures(value)} s"
    else:
        text = format_duration(value)
    return text + COMPOSED_MARK * composed


def percent(fraction: float) -> str:
    """Write a fraction as a percentage with two significant figures, one decimal below ten."""
    value = abs(fraction) * 100
    if value == 0:
        return "0%"
    return f"{value:.2g}%" if value < 10 else f"{value:,.0f}%"


def _three_figures(value: float) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"
