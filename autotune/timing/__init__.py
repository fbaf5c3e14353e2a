"""Seconds of one optimizer step: formulas, and what was measured where something was."""

from autotune.timing.calibration import Calibration, Collective
from autotune.timing.estimate import ColdStart, TimeEstimate, TimeTable
from autotune.timing.links import collective_s
from autotune.timing.table import estimate_time, estimate_time_table

__all__ = [
    "Calibration", "ColdStart", "Collective", "TimeEstimate", "TimeTable", "collective_s",
    "estimate_time", "estimate_time_table",
]  # fmt: skip
