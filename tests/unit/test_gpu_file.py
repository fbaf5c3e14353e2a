"""A user's own GPU: the documented example works, and each mistake is one clear message."""

import re
from pathlib import Path

import pytest
import yaml

from autotune.errors import AutotuneError
from autotune.spec.gpus import GpuEntry, gpu_types, read_gpu_file
from autotune.spec.hardware import load_hardware
from autotune.units import GIB

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "capacity.md").read_text()
EXAMPLE = re.search(r"```yaml\n# mygpu.yaml\n(.*?)```", DOCUMENT, re.DOTALL)[1]


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "mygpu.yaml"
        path.write_text(text)
        return path

    return written


def test_the_documented_example_is_a_gpu(write):
    path = write(EXAMPLE)
    hardware = load_hardware(str(path), 16)
    values = yaml.safe_load(EXAMPLE)
    assert hardware.gpu.name == "mygpu"
    assert hardware.gpu.memory_bytes == int(values["memory_gib"] * GIB)
    assert hardware.num_nodes == 16 // values["gpus_per_node"]
    assert hardware.gpu.power_w == values["power_w"]


def test_the_document_lists_every_gpu():
    for name in gpu_types():
        assert f"`{name}`" in DOCUMENT or name == "cpu", name


def test_the_document_explains_every_field():
    for name in GpuEntry.model_fields:
        assert f"`{name}`" in DOCUMENT, name


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hbm_tb_per_s", "hbm_tbps", r"line 2: unknown key 'hbm_tbps'. Nearest: hbm_tb_per_s"),
        ("memory_gib: ", "memory_gib: -", r"line 1: memory_gib: Input should be greater than 0"),
        ("fp32:", "fp4:", r"line 3: tflops.fp4: Input should be 'bf16', 'fp16', 'tf32', 'fp32'"),
        ("link: pcie", "link: wire", r"line 4: link: Input should be 'nvlink', .*'wire'"),
        ("power_w: 300\n", "", r"power_w is missing; every GPU needs memory_gib, "),
        ("power_w: 300", "power_w: .nan", r"power_w: Input should be a finite number"),
        ("power_w: 300", "power_w: [", r"is not YAML: while parsing"),
        ("power_w: 300", "power_w: 2020-13-45", r"is not YAML: month must be in"),
        (EXAMPLE, "- 1\n", r"must hold the fields of one GPU \(memory_gib, .*not list"),
        (EXAMPLE, "", r"must hold the fields of one GPU .*not NoneType"),
    ],
)
def test_mistakes(write, old, new, words):
    assert old in EXAMPLE
    with pytest.raises(AutotuneError, match=words) as caught:
        read_gpu_file(write(EXAMPLE.replace(old, new, 1)))
    assert "mygpu.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(AutotuneError, match=r"No such file.*h100-sxm"):
        load_hardware(str(tmp_path / "none.yaml"), 1)


def test_the_name_of_the_cpu_ranks_is_taken(tmp_path):
    path = tmp_path / "cpu.yaml"
    path.write_text(EXAMPLE)
    with pytest.raises(AutotuneError, match="CPU ranks"):
        load_hardware(str(path), 1)
