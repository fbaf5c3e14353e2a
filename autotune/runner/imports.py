"""The imports of every rank, in one place: forked and cold ranks note their baseline after them."""

from __future__ import annotations

import gc

from autotune.trial.native_ops import needed_ops
from autotune.trial.protocol import Request


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


def load_operators(request: Request) -> None:
    """Load DeepSpeed's built operators that the request's plan will use on CPU ranks; each once.

    On CUDA they ask each device for its capability, which makes a context there: too early.

    Raises:
        RuntimeError, ImportError, OSError: one is not built, and cannot be.
    """
    if request.device != "cpu":
        return
    from deepspeed.accelerator import get_accelerator

    for name in needed_ops(request.plan_object(), request.device):
        get_accelerator().create_op_builder(name).load()
