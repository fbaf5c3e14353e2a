"""The imports of every rank, in one place: forked and cold ranks note their baseline after them."""

from __future__ import annotations

import gc


def import_everything() -> None:
    """Import what trials and full runs of any engine need.

    DeepSpeed is among it for every engine: accelerate imports it while it prepares a model,
    whichever engine that is, and it would count as the model's memory.
    """
    import deepspeed  # noqa: F401

    import autotune.runner.train
    import autotune.runner.trial  # noqa: F401

    # What imports made stays for good. DeepSpeed collects garbage a dozen times while it starts,
    # and in a forked rank each of these would copy every page that holds an object.
    gc.collect()
    gc.freeze()
