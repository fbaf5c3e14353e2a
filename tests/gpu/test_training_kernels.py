"""Adapters over a base in 4 bits, Liger, 8-bit optimizers and offloading on one CUDA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.spec.workload import BaseStorage, LigerKernel, Lora, Workload
from tests.gpu.test_gpu import SEQ_LEN, ran
from tests.integration.ranks import make_plan

pytestmark = pytest.mark.gpu

STRATEGIES = ["ddp", "zero2", "zero3", "fsdp2"]


def workload(**values: object) -> Workload:
    return Workload(**({"seq_len": SEQ_LEN, "global_batch_size": 8} | values))


def peak(strategy: str, folder: Path, *, recompute: bool = False, **values: object):
    plan = make_plan(strategy, 1, recompute=recompute)
    ended, (record,) = ran(plan, folder, rungs=[(4, 2)], workload=workload(**values))
    return record.peak_allocated_bytes, ended.results[0].asserted


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_base_in_4_bits(strategy: str, dora: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = Lora(r=8, dora=dora)
    packed = adapter.model_copy(update={"base_storage": BaseStorage.NF4_DOUBLE})
    whole, _ = peak(strategy, tmp_path / "whole", adapter=adapter)
    in_4bit, asserted = peak(strategy, tmp_path / "packed", adapter=packed)
    assert asserted["layers_in_4bit"] == 8 * 7
    assert in_4bit < whole


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_liger(strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    plain, _ = peak(strategy, tmp_path / "plain")
    fused, asserted = peak(strategy, tmp_path / "fused", liger=tuple(LigerKernel))
    assert asserted["liger"] == [str(kernel) for kernel in LigerKernel]
    assert fused < plain


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_float8(strategy: str, gathered: bool, tmp_path: Path) -> None:
    """The device's own products: an emulation would be found by the check before the first step."""
    pytest.importorskip("torchao")
    torch = pytest.importorskip("torch")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products of 8-bit floats need compute capability 8.9")
    if gathered and strategy != "fsdp2":
        pytest.skip("FSDP2 alone gathers in float8")
    _, asserted = peak(strategy, tmp_path / "float8", fp8=True, fp8_all_gather=gathered)
    assert asserted["float8_projections"] == 8 * 7 - 1


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_8_bit_optimizers(strategy: str, optimizer: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, _ = peak(strategy, tmp_path / "plain")
    smaller, asserted = peak(strategy, tmp_path / "8-bit", optimizer=optimizer)
    assert asserted["optimizer"] == optimizer
    assert smaller < plain


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_activations_in_host_memory(strategy: str, tmp_path: Path) -> None:
    plain, _ = peak(strategy, tmp_path / "plain", recompute=True)
    sent, _ = peak(strategy, tmp_path / "sent", recompute=True, activation_offloading=True)
    assert sent < plain


def test_the_chunked_loss(tmp_path: Path) -> None:
    plain, _ = peak("fsdp2", tmp_path / "plain", recompute=True)
    chunked, _ = peak("fsdp2", tmp_path / "chunked", recompute=True, chunked_loss=True)
    assert chunked < plain
