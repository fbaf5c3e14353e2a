"""Make accelerate run real FSDP2 on CPU ranks.

accelerate picks FSDP only when the distributed type is one of its accelerators; on CPU processes it
falls back to DDP without a word (accelerate 1.15, `AcceleratorState.__init__`). The shim tells it
that several CPU ranks are several GPUs, and keeps the device on the CPU. It touches two private
names of accelerate (`PartialState._prepare_backend`, `PartialState.set_device`); a test holds them.
"""

from __future__ import annotations

import os

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

DISABLE_VARIABLE = "AUTOTUNE_NO_CPU_SHIM"
"""Set by the test that shows what happens without the shim: the trial must end INVALID."""


def install_cpu_fsdp_shim() -> bool:
    """Install the shim; call it on CPU only, after the process group exists.

    Returns:
        False when `AUTOTUNE_NO_CPU_SHIM` switched it off.
    """
    if os.environ.get(DISABLE_VARIABLE):
        return False
    prepare_backend = PartialState._prepare_backend

    def cpu_ranks_count_as_gpus(
        self: PartialState,
        cpu: bool = False,
        sagemaker_dp: bool = False,
        backend: str | None = None,
    ) -> tuple[str, DistributedType]:
        backend, kind = prepare_backend(self, cpu, sagemaker_dp, backend)
        return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind

    def stay_on_cpu(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = cpu_ranks_count_as_gpus
    PartialState.set_device = stay_on_cpu
    return True
