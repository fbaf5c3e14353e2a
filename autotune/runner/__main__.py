"""Entry of one rank: ``python -m autotune.runner REQUEST.json`` with RANK and WORLD_SIZE set."""

from __future__ import annotations

import sys
from pathlib import Path

from autotune.runner.rank import run_rank

if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
