"""Every check in its order."""

from __future__ import annotations

from typing import Literal

from autotune.doctor.collectives import check_collectives
from autotune.doctor.finding import Finding, Machine, note
from autotune.doctor.gpus import check_gpus, check_links
from autotune.doctor.host import (
    check_extension_locks,
    check_host_memory,
    check_limits,
    check_shared_memory,
)
from autotune.doctor.network import (
    check_infiniband,
    check_nccl,
    check_variables,
    infiniband_adapters,
    nccl_packages,
)
from autotune.doctor.nvml import read_gpus
from autotune.doctor.software import (
    check_accelerate_file,
    check_compiler,
    check_versions,
    installed,
)


def examine(
    machine: Machine,
    *,
    device: Literal["cuda", "cpu"],
    ranks: int,
    nodes: int = 1,
    model: str = "",
    num_parameters: int | None = None,
    collectives_timeout_s: float | None = None,
) -> list[Finding]:
    """Run every check.

    Args:
        machine: Where to look.
        device: What the ranks would use.
        ranks: Of a run on this host.
        nodes: Hosts of a run.
        model: Its name.
        num_parameters: Of the model; None leaves it out.
        collectives_timeout_s: How long an all-reduce may take; None starts no ranks.
    """
    gpus, pairs, driver_cuda = read_gpus() if device == "cuda" else ([], [], None)
    infiniband = bool(infiniband_adapters(machine))
    versions = installed()
    found = [
        *check_gpus(gpus),
        *check_links(pairs),
        *check_nccl(nccl_packages(), gpus=len(gpus)),
        *check_variables(machine, infiniband=infiniband),
        *check_infiniband(machine, nodes=nodes),
        *check_shared_memory(machine, ranks=ranks if device == "cuda" else 1),
        *check_limits(infiniband=infiniband),
        *check_host_memory(machine, num_parameters=num_parameters, model=model, ranks=ranks),
        *check_versions(versions, gpus=len(gpus), driver_cuda=driver_cuda),
        *check_compiler(versions),
        *check_extension_locks(machine),
        *check_accelerate_file(machine, gpus=len(gpus) or ranks),
    ]
    if collectives_timeout_s is None:
        return found
    if ranks < 2 or "torch" not in versions:
        why = "one rank has nobody to sum with" if ranks < 2 else "torch is not installed"
        return [*found, note("allreduce", f"not tried: {why}")]
    return [*found, *check_collectives(ranks, device, collectives_timeout_s)]
