"""Names and defaults for the command line, which does not import Optuna for them."""

SAMPLERS = ("cost-model", "tpe", "gp", "random", "grid", "deepspeed-autotuning")
DEFAULT_SAMPLER = "cost-model"
TOLERANCE = 0.02
"""A configuration that can be faster by this at most is not worth another measurement."""
FINALISTS = 3
"""At most so many are measured again when the search has ended."""
