"""best.yml as text: against golden files, and the details a golden file does not explain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autotune.config import AutotuneBlock, fallback_ladder, load_config
from autotune.emit.axolotl import base_model_of, decoder_layer_class, emit_axolotl
from autotune.emit.run_config import emit_run_config
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.model import load_model
from autotune.spec.training import DatasetSource, TrainSettings
from autotune.spec.workload import Lora, Workload

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODEL = load_model("tiny-qwen3")
ZERO3 = Plan(
    strategy="zero3_offload_params", engine=Engine.DEEPSPEED, zero_stage=3, offload_optimizer=True,
    offload_params=True, dp_shard=2, cp=2, micro_batch_size=4, grad_accum_steps=2,
)  # fmt: skip
HSDP = Plan(
    strategy="hsdp", engine=Engine.FSDP2, dp_shard=2, dp_replicate=2, micro_batch_size=4,
    recompute=Recompute.FULL,
)  # fmt: skip


def emitted(plan: Plan) -> str:
    block = AutotuneBlock(
        version="0.1.0", num_gpus=4, device="cpu", hardware={"gpu": "cpu", "ranks": 4},
        plan_id=plan.id, measured={"tokens_per_s": 1234.5, "step_s": 1.5},
        ladder=tuple(fallback_ladder(plan)),
    )  # fmt: skip
    return emit_axolotl(
        MODEL,
        Workload(adapter=Lora(r=8)) if plan is HSDP else Workload(),
        plan,
        train=TrainSettings(learning_rate=2e-5, max_steps=100),
        datasets=[DatasetSource(path="corpus.jsonl", type="completion")],
        output_dir="./out",
        device="cpu",
        autotune=block,
    )


@pytest.mark.parametrize(("name", "plan"), [("zero3_cp2", ZERO3), ("hsdp_lora", HSDP)])
def test_golden(name, plan):
    """After a wanted change, write the text printed by a failure into the golden file."""
    assert emitted(plan) == (GOLDEN / f"best_{name}.yml").read_text()


@pytest.mark.parametrize(
    ("packing", "stride", "keys"),
    [
        (True, 2, {"ring_attn_func": "varlen_llama3", "heads_k_stride": 2}),
        (False, 1, {"ring_attn_func": "batch_ring"}),
    ],
)
def test_a_ring_is_written_and_read(packing, stride, keys, tmp_path):
    plan = replace(ZERO3, cp_backend=CpBackend.RING, heads_k_stride=stride)
    text = emit_axolotl(MODEL, Workload(packing=packing), plan, device="cpu")
    written = yaml.safe_load(text)
    assert {k: v for k, v in written.items() if k in ("ring_attn_func", "heads_k_stride")} == keys
    assert "Ulysses" not in text
    (tmp_path / "best.yml").write_text(text)
    read = load_config(tmp_path / "best.yml")
    assert (read.plan(4).cp_backend, read.plan(4).heads_k_stride) == (CpBackend.RING, stride)
    (tmp_path / "again.yml").write_text(emit_run_config(read))
    assert load_config(tmp_path / "again.yml") == read


def test_floats_are_floats_to_every_yaml_parser():
    """`2e-05` without a dot is text to PyYAML; `2.0e-05` is a number to all."""
    assert "learning_rate: 2.0e-05\n" in emitted(HSDP)


def test_header_names_the_command_and_the_figure():
    head = emitted(ZERO3).splitlines()[:4]
    assert all(line.startswith("# ") for line in head)
    assert "1,234 tokens/s measured" in head[0]
    assert "autotune train best.yml" in head[1]
    assert "measured" not in emit_axolotl(MODEL, Workload(), ZERO3)


def test_a_hostile_model_name_stays_in_the_comment():
    model = MODEL.model_copy(update={"name": "x\nrl: dpo"})
    assert "rl" not in yaml.safe_load(emit_axolotl(model, Workload(), HSDP))


def test_base_model():
    assert base_model_of(load_model("qwen3-8b")) == "Qwen/Qwen3-8B"
    assert base_model_of(MODEL) == "tiny-qwen3"
    assert base_model_of(load_model("gpt-oss-20b")) == "gpt-oss-20b"  # quantised on the Hub
    assert base_model_of(MODEL.model_copy(update={"weights": "/w"})) == "/w"


@pytest.mark.parametrize(
    ("name", "layer"), [("qwen3-8b", "Qwen3DecoderLayer"), ("tiny-llama", "LlamaDecoderLayer")]
)
def test_decoder_layer_class(name, layer):
    assert decoder_layer_class(load_model(name)) == layer


def test_ladder_keeps_the_global_batch_and_goes_down():
    plan = replace(ZERO3, micro_batch_size=6, grad_accum_steps=2)
    rungs = fallback_ladder(plan)
    assert [rung.micro_batch_size for rung in rungs] == [4, 3, 2, 1, 1]
    assert {r.micro_batch_size * r.gradient_accumulation_steps for r in rungs} == {12}
    assert [rung.gradient_checkpointing for rung in rungs] == [False] * 4 + [True]


def test_ladder_of_the_smallest_plan():
    smallest = replace(HSDP, micro_batch_size=1)
    assert fallback_ladder(smallest) == []
    (rung,) = fallback_ladder(replace(smallest, recompute=Recompute.NONE))
    assert rung.gradient_checkpointing
