"""Memory of one rank, by component and instant; formulas in docs/formulas.md."""

from autotune.memory.estimate import MemoryEstimate, estimate_memory
from autotune.memory.table import MemoryTable, estimate_memory_table
from autotune.memory.verdict import Verdict, fit_probability, verdict

__all__ = [
    "MemoryEstimate", "MemoryTable", "Verdict", "estimate_memory", "estimate_memory_table",
    "fit_probability", "verdict",
]  # fmt: skip
