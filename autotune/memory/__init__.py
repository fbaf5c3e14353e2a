"""Closed-form memory of one rank, by component and instant; formulas in docs/formulas.md."""

from autotune.memory.estimate import MemoryEstimate, estimate_memory
from autotune.memory.verdict import Verdict, fit_probability, verdict

__all__ = ["MemoryEstimate", "Verdict", "estimate_memory", "fit_probability", "verdict"]
