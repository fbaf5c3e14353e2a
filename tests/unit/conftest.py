"""For the unit tests: what is predicted does not depend on what happens to be installed."""

import os
import tempfile

os.environ["AUTOTUNE_TRACE"] = "off"
# Nor on profiles that another run has traced; nothing is written there.
os.environ["AUTOTUNE_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "autotune-no-cache")
