"""For all tests: what this user's machine measured is not read, and nothing is added to it."""

import os

os.environ["AUTOTUNE_KNOWLEDGE"] = "off"
