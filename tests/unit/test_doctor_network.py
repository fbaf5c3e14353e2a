"""What the doctor finds of InfiniBand, interfaces, variables and NCCL's packages."""

from __future__ import annotations

import pytest

from autotune.doctor import Level
from autotune.doctor.network import check_infiniband, check_nccl, check_variables
from tests.unit.doctor_levels import levels, worst


def test_infiniband_ports(machine):
    assert check_infiniband(machine(), nodes=1)[0].level is Level.OK
    alone = check_infiniband(machine(), nodes=2)[0]
    assert alone.level is Level.WARNING and "NCCL_SOCKET_IFNAME" in alone.do
    port = "sys/class/infiniband/mlx5_{}/ports/1/{}"
    files = {
        port.format(0, "state"): "4: ACTIVE\n", port.format(0, "rate"): "400 Gb/sec (4X NDR)\n",
        port.format(0, "link_layer"): "InfiniBand\n", port.format(1, "state"): "1: DOWN\n",
    }  # fmt: skip
    up, down = check_infiniband(machine(files), nodes=2)
    assert up.level is Level.OK and "400 Gb/sec" in up.seen
    assert down.level is Level.WARNING and "NCCL_IB_HCA=^mlx5_1" in down.do


def test_variables_that_slow_or_mislead(machine):
    net = {"sys/class/net/lo/x": "", "sys/class/net/eth0/x": ""}
    assert levels(check_variables(machine(net), infiniband=True)) == {"nccl_env": Level.OK}
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "CUDA_LAUNCH_BLOCKING"):
        (found,) = check_variables(machine(net, **{name: "1"}), infiniband=True)
        assert found.level is Level.WARNING and f"unset {name}" in found.do
        assert worst(check_variables(machine(net, **{name: "0"}), infiniband=True)).level in (
            Level.OK, Level.NOTE,
        )  # fmt: skip
    assert worst(check_variables(machine(net, NCCL_IB_DISABLE="1"), infiniband=False)).level in (
        Level.OK, Level.NOTE,
    )  # fmt: skip
    (found,) = check_variables(machine(net, ACCELERATE_USE_FSDP="true"), infiniband=False)
    assert found.level is Level.WARNING and "ACCELERATE_USE_FSDP" in found.seen
    (found,) = check_variables(machine(net, RANK="0", WORLD_SIZE="8"), infiniband=False)
    assert found.level is Level.NOTE and "RANK, WORLD_SIZE" in found.seen


@pytest.mark.parametrize(
    ("name", "value", "chosen"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "eth0"),
        ("NCCL_SOCKET_IFNAME", "=eth", None),
        ("NCCL_SOCKET_IFNAME", "=eth0", "eth0"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", "eth0"),
        ("NCCL_SOCKET_IFNAME", "ib0", None),
        ("GLOO_SOCKET_IFNAME", "eth", None),
        ("GLOO_SOCKET_IFNAME", "lo", "lo"),
    ],
)
def test_interfaces_as_the_libraries_read_them(machine, name, value, chosen):
    net = {"sys/class/net/lo/x": "", "sys/class/net/eth0/x": ""}
    (found,) = check_variables(machine(net, **{name: value}), infiniband=False)
    assert found.level is (Level.BROKEN if chosen is None else Level.NOTE)
    if chosen:
        assert found.seen.endswith(f"chooses {chosen}")
    else:
        assert "one of eth0, lo" in found.do


def test_nccl_packages():
    assert check_nccl({}, gpus=0)[0].level is Level.OK
    assert check_nccl({"nvidia-nccl-cu13": "2.28"}, gpus=8)[0].level is Level.OK
    two = check_nccl({"nvidia-nccl-cu12": "2.27", "nvidia-nccl-cu13": "2.28"}, gpus=8)[0]
    assert two.level is Level.WARNING and "cu12 2.27" in two.seen
