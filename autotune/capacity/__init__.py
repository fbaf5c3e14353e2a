"""Capacity planning: which GPUs, how many, how long, at what cost."""

from autotune.capacity.answers import Answers, find_answers
from autotune.capacity.calibration import Calibration, Factors, calibrate
from autotune.capacity.cells import Cell, Fit, Question, make_cells

__all__ = [
    "Answers", "Calibration", "Cell", "Factors", "Fit", "Question", "calibrate", "find_answers",
    "make_cells",
]  # fmt: skip
