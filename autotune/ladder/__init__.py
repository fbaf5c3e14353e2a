"""After out-of-memory in a full run: what comes next, and going on there from the checkpoint."""

from autotune.ladder.descent import lowered, train_down
from autotune.ladder.record import Descent, at_recorded_rung
from autotune.ladder.rungs import Ladder, Step, ladder_below

__all__ = [
    "Descent",
    "Ladder",
    "Step",
    "at_recorded_rung",
    "ladder_below",
    "lowered",
    "train_down",
]
