"""How sequences are split survives an import, and can be said where the file has no word for it."""

from __future__ import annotations

import json
import textwrap

import pytest

from autotune.cli import main
from autotune.config import load_config
from autotune.config.foreign import StartingPoint, load_any
from autotune.errors import AutotuneError
from autotune.plan import CpBackend

AXOLOTL = """
base_model: tiny-qwen3
learning_rate: 1e-4
sample_packing: {packed}
sequence_len: 256
context_parallel_size: {cp}
fsdp_version: 2
fsdp_config: {{reshard_after_forward: true}}
"""
DEEPSPEED = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
TORCH_CP = """
distributed_type: FSDP
mixed_precision: bf16
num_processes: 4
fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: true}
parallelism_config: {parallelism_config_cp_size: 2, parallelism_config_dp_shard_size: 2}
"""


def imported(path, *words, gpus=4):
    """Import by the command, and read what it wrote."""
    out = path.with_name("out.yml")
    with pytest.raises(SystemExit) as caught:
        main(["import", str(path), "--gpus", str(gpus), "--out", str(out), "--force", *words])
    return caught.value.code, load_config(out).plan(gpus) if out.exists() else None


@pytest.mark.parametrize(
    ("packed", "more", "backend", "stride"),
    [
        ("true", "ring_attn_func: varlen_llama3\nheads_k_stride: 2", CpBackend.RING, 2),
        ("true", "heads_k_stride: 2", CpBackend.RING, 2),
        ("false", "ring_attn_func: batch_ring", CpBackend.RING, 1),
        ("true", "", CpBackend.ULYSSES, 1),
    ],
)
def test_an_axolotl_file_keeps_its_split(tmp_path, packed, more, backend, stride):
    path = tmp_path / "in.yml"
    path.write_text(AXOLOTL.format(packed=packed, cp=2) + more)
    code, plan = imported(path)
    assert code == 0 and (plan.cp, plan.cp_backend, plan.heads_k_stride) == (2, backend, stride)
    assert plan == load_config(path).plan(4)


def test_the_ranks_asked_for_are_written(tmp_path):
    """A file of Axolotl's names none: the flag was read and dropped."""
    path, out = tmp_path / "in.yml", tmp_path / "out.yml"
    path.write_text(AXOLOTL.format(packed="true", cp=2) + "autotune: {device: cpu}\n")
    assert imported(path, gpus=8)[0] == 0
    written = load_config(out)
    assert (written.num_gpus, written.autotune.device) == (8, "cpu")


def test_ranks_that_the_file_cannot_be_laid_out_over_are_refused(tmp_path, capsys):
    path = tmp_path / "in.yml"
    path.write_text(AXOLOTL.format(packed="true", cp=2))
    assert imported(path, gpus=3) == (2, None)
    assert "AT102" in capsys.readouterr().err


@pytest.mark.parametrize("packed", ["true", "false"])
def test_the_flag_goes_over_an_axolotl_file(tmp_path, packed):
    path = tmp_path / "in.yml"
    path.write_text(AXOLOTL.format(packed=packed, cp=2))
    assert imported(path, "--sequence-parallel-by", "ring")[1].cp_backend is CpBackend.RING
    ring = "ring_attn_func: varlen_llama3\nheads_k_stride: 2\n" if packed == "true" else (
        "ring_attn_func: batch_ring\n")  # fmt: skip
    path.write_text(AXOLOTL.format(packed=packed, cp=2) + ring)
    assert imported(path, "--sequence-parallel-by", "ulysses")[1].cp_backend is CpBackend.ULYSSES


def test_files_that_have_no_word_for_it(tmp_path, capsys):
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text(textwrap.dedent(TORCH_CP))
    mapping = tmp_path / "ds.json"
    mapping.write_text(json.dumps(DEEPSPEED | {"sequence_parallel_size": 2}))
    for path in (accelerate, mapping):
        model = ("--model", "tiny-qwen3")
        plain, asked = imported(path, *model), imported(
            path, *model, "--sequence-parallel-by", "ring"
        )  # fmt: skip
        assert (plain[1].cp, plain[1].cp_backend) == (2, CpBackend.ULYSSES)
        assert (asked[1].cp, asked[1].cp_backend) == (2, CpBackend.RING)
    said = " ".join(capsys.readouterr().err.split())
    assert "With --sequence-parallel-by ring it is read as ring attention" in said


def test_what_cannot_be_asked_for(tmp_path, capsys):
    path = tmp_path / "in.yml"
    path.write_text(AXOLOTL.format(packed="true", cp=1))
    code, _ = imported(path, "--sequence-parallel-by", "ring")
    assert code == 2 and "splits no sequences" in capsys.readouterr().err
    path.write_text(AXOLOTL.format(packed="true", cp=3))  # tiny-qwen3 has no multiple of 3 heads
    assert imported(path, gpus=3)[1].cp_backend is CpBackend.RING
    with pytest.raises(AutotuneError, match="does not divide the heads of tiny-qwen3"):
        load_any(path, StartingPoint(num_gpus=3, sequence_parallel_by=CpBackend.ULYSSES))
