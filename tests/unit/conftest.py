"""For the unit tests: what is predicted does not depend on what happens to be installed."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["AUTOTUNE_TRACE"] = "off"
# Nor on profiles that another run has traced; nothing is written there.
os.environ["AUTOTUNE_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "autotune-no-cache")

# The modules of a benchmark lie in a folder, not in a package. Last, so that they hide nothing.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "search"))
