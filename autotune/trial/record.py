"""`TrialRecord`: one measured (or failed) configuration; the row of the CSV."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter

from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.trial.protocol import Outcome

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
# Beyond 64 bits nothing was counted, and no float holds it.
_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One configuration as predicted and as measured; field order is the CSV's column order.

    Measured fields are None when the configuration did not run to the end.
    """

    launch: _Count
    """Number of the launch (one start of all ranks) that measured it."""
    plan_id: str
    outcome: Outcome
    message: str
    """Why it failed, empty when it did not."""
    plan: dict[str, Any]
    """`Plan.to_dict()`; flattened to `plan_*` columns in the CSV."""
    tokens_per_s: _Positive | None = None
    """`step_tokens / step_s`, over all ranks."""
    step_tokens: _NotNegative | None = None
    """Valid tokens (those with a label) of an optimizer step of the data's average sequences.

    The same for every configuration of one global batch, so that these differ by their time alone.
    """
    step_tokens_read: _NotNegative | None = None
    """Mean valid tokens of the sequences the counted steps happened to read, for comparison.

    Scaled to the plan's accumulation, as `step_s` is, where that was not measured.
    """
    step_s: _Positive | None = None
    """Optimizer step at the plan's accumulation, slowest rank."""
    step_s_low: float | None = None
    step_s_high: float | None = None
    """95% confidence interval of `step_s` from the spread of the counted steps."""
    micro_step_s: _NotNegative | None = None
    """Median micro-step without gradient synchronisation."""
    sync_micro_step_s: _NotNegative | None = None
    optimizer_step_s: _NotNegative | None = None
    measured_accum_steps: tuple[_Count, ...] = ()
    """Accumulations that ran; `step_s` is composed from them when the plan's is not among them."""
    peak_allocated_bytes: _Count | None = None
    """Largest over ranks, at the accumulation `step_s` rests on."""
    peak_reserved_bytes: _Count | None = None
    alloc_retries: _Count | None = None
    predicted_bytes: _Count | None = None
    """By the formulas and what had been measured before the launch."""
    predicted_low_bytes: _Count | None = None
    predicted_high_bytes: _Count | None = None
    """90% interval of it."""
    predicted_fit_probability: _NotNegative | None = None
    predicted_step_s: _Positive | None = None
    predicted_tokens_per_s: _Positive | None = None
    predicted_verdict: str | None = None
    launch_s: _NotNegative | None = None
    """Whole launch that measured it, from starting the ranks to their end."""
    started_at: str = ""
    """ISO 8601, UTC."""
    log_dir: str = ""
    """Folder of the launch, relative to the study's."""
    step_times_s: tuple[_Positive, ...] = ()
    """Every counted step at the accumulation `step_s` rests on, slowest rank."""
    cut_short: bool = False
    """It was given up as surely too slow: few steps, and an interval as wide as they leave it."""
    warmup_times_s: tuple[_NotNegative, ...] = ()
    """Steps before those of `step_times_s`."""
    rung_wall_s: _NotNegative | None = None
    """From the rung's begin to its end, warm-up included, slowest rank."""
    launch_ready_s: _NotNegative | None = None
    """From its launch's start to the first step of the launch, slowest rank."""
    evaluation_s: _NotNegative | None = None
    """One evaluation step, slowest rank; of a confirmation alone, whose peaks include it."""
    save_s: _NotNegative | None = None
    """One checkpoint, slowest rank; of a confirmation alone, whose peaks include it."""
    launch_mode: str = ""
    """How its ranks were started: `cold` or `fork`; empty where nobody noted it."""

    @property
    def plan_object(self) -> Plan:
        """The plan as its type."""
        return Plan.from_dict(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        values = asdict(self)
        values["outcome"] = str(self.outcome)
        values["measured_accum_steps"] = list(self.measured_accum_steps)
        values["step_times_s"] = list(self.step_times_s)
        values["warmup_times_s"] = list(self.warmup_times_s)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialRecord:
        """Read what `to_dict` wrote; fields of a newer version are left out.

        Raises:
            KeyError, TypeError: a missing field.
            ValueError: a value that no trial can have written.
        """
        known = {field.name for field in fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        kept["outcome"] = Outcome(kept["outcome"])
        for name in ("measured_accum_steps", "step_times_s", "warmup_times_s"):
            kept[name] = tuple(kept.get(name, ()))
        record = cls(**kept)
        for name, check in _record_checks().items():
            check.validate_python(getattr(record, name))
        for name, check in _plan_checks().items():
            if name in record.plan:
                check.validate_python(record.plan[name])
        return record


_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@functools.cache
def _record_checks() -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(TrialRecord, include_extras=True)
    return {f.name: TypeAdapter(hints[f.name], config=_STRICT) for f in fields(TrialRecord)}


@functools.cache
def _plan_checks() -> dict[str, TypeAdapter[Any]]:
    """Return what a plan's fields may hold: names are any text, another version has others."""
    hints = get_type_hints(Plan)
    kinds = {str: str, bool: bool, int: _Count, CpBackend: str, Engine: str, Recompute: str}
    return {f.name: TypeAdapter(kinds[hints[f.name]], config=_STRICT) for f in fields(Plan)}
