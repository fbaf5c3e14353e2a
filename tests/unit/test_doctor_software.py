"""What the doctor finds of versions, compilers and accelerate's default file."""

from __future__ import annotations

from autotune.doctor import Level
from autotune.doctor.software import (
    LOWEST,
    check_accelerate_file,
    check_compiler,
    check_versions,
)
from tests.unit.doctor_levels import levels, worst

VERSIONS = {
    "torch": "2.13.0+cu130", "transformers": "5.24.0", "accelerate": "1.15.0",
    "deepspeed": "0.19.8", "ninja": "1.13",
}  # fmt: skip


def test_versions():
    assert levels(check_versions(VERSIONS, gpus=8, driver_cuda=(13, 0)))["versions"] is Level.OK
    for name in LOWEST:
        (old,) = check_versions(VERSIONS | {name: "0.1+cu130"}, gpus=8, driver_cuda=(13, 0))
        assert old.level is Level.WARNING and f"{name} 0.1" in old.seen
    cpu = VERSIONS | {"torch": "2.13.0+cpu"}
    assert levels(check_versions(cpu, gpus=0)) == {"versions": Level.OK}
    assert levels(check_versions(cpu, gpus=1))["torch"] is Level.BROKEN
    old_driver = worst(check_versions(VERSIONS, gpus=1, driver_cuda=(12, 8)))
    assert old_driver.level is Level.BROKEN and "CUDA 13" in old_driver.seen
    both = VERSIONS | {"pynvml": "13.0", "nvidia-ml-py": "13.6"}
    assert worst(check_versions(both, gpus=1, driver_cuda=(13, 0))).level is Level.WARNING
    (missing,) = (f for f in check_versions({}, gpus=0) if f.check == "versions")
    assert missing.level is Level.NOTE and "autotune-llm[train]" in missing.do


def test_a_compiler_is_looked_for_where_deepspeed_is(tmp_path):
    assert check_compiler({}) == []
    assert check_compiler(VERSIONS, lambda name: f"/bin/{name}")[0].level is Level.OK
    bare = VERSIONS.copy()
    del bare["ninja"]
    (found,) = check_compiler(bare, lambda name: None)
    assert found.level is Level.BROKEN and "C++ compiler and ninja" in found.seen


def test_accelerate_s_default_file(machine):
    assert check_accelerate_file(machine(), gpus=8)[0].level is Level.OK
    text = "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 4\n"
    file = "home/.cache/huggingface/accelerate/default_config.yaml"
    (stale,) = check_accelerate_file(machine({file: text}), gpus=8)
    assert stale.level is Level.WARNING and "FSDP on 4 processes" in stale.seen
    assert check_accelerate_file(machine(), gpus=4)[0].level is Level.NOTE
    elsewhere = machine({"hf/accelerate/default_config.json": '{"num_processes": 4}'}, HF_HOME="hf")
    assert "hf/accelerate" in check_accelerate_file(elsewhere, gpus=8)[0].seen
