"""For the unit tests: what is predicted does not depend on what happens to be installed."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["AUTOTUNE_TRACE"] = "off"
# Nor on profiles that another run has traced; nothing is written there.
os.environ["AUTOTUNE_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "autotune-no-cache")

# The modules of a benchmark lie in a folder, not in a package. Last, so that they hide nothing.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "search"))


@pytest.fixture
def machine(tmp_path):
    """Return what makes a machine of files for the doctor; `variables` are the environment."""

    from autotune.doctor import Machine

    def make(files=None, **variables):
        for name, text in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Machine(root=tmp_path, home=tmp_path / "home", variables=variables)

    return make
