"""accelerate and DeepSpeed files as a starting point: what is told, read, warned of, refused."""

from __future__ import annotations

import json
import textwrap

import pytest

from autotune.cli import main
from autotune.config.foreign import FileKind, StartingPoint, load_any
from autotune.config.foreign.recognise import recognise
from autotune.errors import AutotuneError
from autotune.plan import Engine, Recompute
from autotune.spec.model import load_model
from autotune.spec.workload import Precision

FSDP1 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_sharding_strategy: {strategy}
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_use_orig_params: true
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: {machines}
num_processes: 8
use_cpu: false
"""
DEEPSPEED = """
distributed_type: DEEPSPEED
mixed_precision: bf16
num_processes: 4
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 0.5
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
  zero_stage: 3
"""
JSON = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 65536},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "train_batch_size": 32,
    "gradient_clipping": 0.25,
}


@pytest.fixture
def read(tmp_path):
    def run(content, **start):
        text = json.dumps(content) if isinstance(content, dict) else textwrap.dedent(content)
        (tmp_path / "foreign").write_text(text)
        return load_any(tmp_path / "foreign", StartingPoint(model="tiny-qwen3", **start))

    return run


def refusal(read, content, **start) -> str:
    with pytest.raises(AutotuneError) as error:
        read(content, **start)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"base_model", "deepspeed"}, FileKind.AXOLOTL),
        ({"learning_rate", "micro_batch_size"}, FileKind.AXOLOTL),
        ({"distributed_type", "fsdp_config"}, FileKind.ACCELERATE),
        ({"compute_environment"}, FileKind.ACCELERATE),
        ({"zero_optimization"}, FileKind.DEEPSPEED),
        ({"train_batch_size", "optimizer"}, FileKind.DEEPSPEED),
    ],
)
def test_the_content_tells_the_format(keys, kind):
    assert recognise(dict.fromkeys(keys), "x") is kind


def test_a_file_of_no_known_format_is_refused(read):
    said = refusal(read, "services: {web: 1}\n")
    assert "services" in said and "distributed_type" in said


@pytest.mark.parametrize(
    ("strategy", "machines", "expected"),
    [
        ("FULL_SHARD", 1, (True, 1, 8)),
        ("1", 1, (True, 1, 8)),
        ("SHARD_GRAD_OP", 1, (False, 1, 8)),
        ("2", 1, (False, 1, 8)),
        ("HYBRID_SHARD", 2, (True, 2, 4)),
        ("HYBRID_SHARD_ZERO2", 2, (False, 2, 4)),
        ("HYBRID_SHARD", 1, (True, 1, 8)),
    ],
)
def test_fsdp1_of_accelerate_keeps_its_sharding(read, strategy, machines, expected):
    loaded = read(FSDP1.format(strategy=strategy, machines=machines))
    plan = loaded.config.plan(8)
    assert plan.engine is Engine.FSDP2
    assert (plan.reshard_after_forward, plan.dp_replicate, plan.dp_shard) == expected
    warned = " ".join((*loaded.warnings, *loaded.config.warnings))
    for key in ("FSDP1", "backward_prefetch", "sync_module_states", "use_orig_params"):
        assert key in warned


def test_no_shard_is_ddp(read):
    loaded = read(FSDP1.format(strategy="NO_SHARD", machines=1))
    assert loaded.config.plan(8).engine is Engine.DDP
    assert "NO_SHARD" in " ".join(loaded.warnings)


def test_accelerates_deepspeed_fields(read):
    loaded = read(DEEPSPEED, micro_batch_size=3)
    plan = loaded.config.plan(loaded.num_gpus)
    assert loaded.kind is FileKind.ACCELERATE and loaded.num_gpus == 4
    assert (plan.zero_stage, plan.offload_optimizer, plan.offload_params) == (3, True, False)
    assert (plan.micro_batch_size, plan.grad_accum_steps, plan.dp_shard) == (3, 4, 4)
    assert loaded.config.train.max_grad_norm == 0.5
    assert loaded.config.contract.precision is Precision.BF16
    warned = " ".join(loaded.warnings)
    assert "sequence_len: 2048" in warned and "micro_batch_size" not in warned


def test_a_field_of_accelerates_deepspeed_that_nothing_reads_is_named(read):
    quiet = read(DEEPSPEED + "  deepspeed_multinode_launcher: pdsh\n")
    assert not any("multinode" in said for said in quiet.warnings)
    start = read(DEEPSPEED + "  deepspeed_moe_layer_cls_names: MixtralSparseMoeBlock\n")
    assert any("deepspeed_moe_layer_cls_names" in said for said in start.warnings)


def test_accelerate_finds_the_deepspeed_file_beside_it(read, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(JSON))
    text = (
        "distributed_type: DEEPSPEED\nnum_processes: 4\n"
        "deepspeed_config: {deepspeed_config_file: ds.json, zero3_init_flag: false}\n"
    )
    plan = read(text).config.plan(4)
    assert (plan.zero_stage, plan.micro_batch_size, plan.grad_accum_steps) == (2, 2, 4)
    assert "mixed_precision" in refusal(read, text + "mixed_precision: bf16\n")
    assert "zero_stage" in refusal(read, text.replace("zero3_init_flag: false", "zero_stage: 2"))
    assert "no/such.json" in refusal(read, text.replace("ds.json", "no/such.json"))


def test_ulysses_of_accelerate(read):
    text = DEEPSPEED + "parallelism_config: {parallelism_config_sp_size: 2}\n"
    plan = read(text).config.plan(4)
    assert (plan.cp, plan.dp_shard) == (2, 2)


def test_fp8_of_accelerate(read):
    fp8 = "mixed_precision: fp8\nfp8_config: {backend: AO, enable_fsdp_float8_all_gather: true}\n"
    text = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\n" + fp8
    contract = read(text).config.contract
    assert contract.fp8 and contract.fp8_all_gather and contract.precision == "bf16"


def test_fp8_of_accelerate_with_deepspeed_is_over_bf16(read):
    text = DEEPSPEED.replace("mixed_precision: bf16", "mixed_precision: fp8")
    contract = read(text).config.contract
    assert contract.fp8 and contract.precision == "bf16"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("num_proceses: 2\n", ["num_proceses", "num_processes"]),
        ("distributed_type: MEGATRON_LM\n", ["MEGATRON_LM", "FSDP"]),
        ("compute_environment: AMAZON_SAGEMAKER\n", ["AMAZON_SAGEMAKER"]),
        ("mixed_precision: fp16\n", ["fp16", "bf16"]),
        ("mixed_precision: fp8\nfp8_config: {backend: TE}\n", ["backend", "AO"]),
        ("num_processes: zero\n", ["num_processes"]),
        ("parallelism_config: {cp_size: 2, sp_size: 2}\n", ["cp_size", "sp_size"]),
        ("parallelism_config: {pp_size: 2}\n", ["pp_size"]),
        ("deepspeed_config: {zero_stage: 3, offload_param_device: nvme}\n", ["nvme"]),
        ("deepspeed_config: {zero_stage: 5}\n", ["stage"]),
    ],
)
def test_what_accelerate_or_this_tool_would_not_run_is_refused(read, extra, words):
    key = extra.split(":")[0]
    lines = [line for line in DEEPSPEED.strip().splitlines() if not line.startswith(key + ":")]
    if key == "deepspeed_config":
        lines = [line for line in lines if not line.startswith("  ")]
    said = refusal(read, "\n".join(lines) + "\n" + extra)
    assert all(word in said for word in words), said


def test_a_json_gives_ranks_batches_and_clipping(read):
    loaded = read(JSON)
    assert loaded.kind is FileKind.DEEPSPEED and loaded.num_gpus == 4
    plan = loaded.config.plan(4)
    assert (plan.micro_batch_size, plan.grad_accum_steps, plan.zero_stage) == (2, 4, 2)
    assert plan.bucket_elements == 0  # 65536 is the square of the hidden size, what "auto" means
    assert load_model("tiny-qwen3").hidden_size == 256
    assert loaded.config.train.max_grad_norm == 0.25


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("train_micro_batch_size_per_gpu", (2, 4)),
        ("gradient_accumulation_steps", (2, 4)),
        ("train_batch_size", (2, 4)),
    ],
)
def test_the_missing_batch_size_follows(read, missing, expected):
    content = {key: value for key, value in JSON.items() if key != missing}
    plan = read(content, num_gpus=4).config.plan(4)
    assert (plan.micro_batch_size, plan.grad_accum_steps) == expected


def test_batch_sizes_that_contradict_each_other_are_refused(read):
    assert "train_batch_size" in refusal(read, JSON | {"train_batch_size": 33})


def test_other_ranks_than_the_file_says_are_named(read):
    loaded = read(JSON, num_gpus=8)
    assert loaded.num_gpus == 8
    assert "4 ranks" in " ".join(loaded.warnings)


def test_optimizer_and_schedule_of_a_json(read):
    content = JSON | {
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.9], "eps": "auto",
                                                  "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7,
                                                          "warmup_min_lr": 0.1}},
    }  # fmt: skip
    loaded = read(content)
    train = loaded.config.train
    assert (train.learning_rate, train.adam_betas) == (3e-4, (0.8, 0.9))
    assert (train.lr_scheduler, train.warmup_steps) == ("linear", 7)
    warned = " ".join(loaded.warnings)
    assert "torch_adam" in warned and "warmup_min_lr" in warned
    assert "learning_rate" not in warned


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype"),
        ({"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing"),
        ({"my_own_key": 1}, "my_own_key"),
        ({"zero_optimization": {"stage": 0}}, "DDP"),
    ],
)
def test_what_has_no_meaning_here_is_named(read, extra, word):
    assert word in " ".join(read(JSON | extra).warnings)


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
        ({"zero_optimization": {"stage": 2, "stag": 1}}, "stag"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized"),
        ({"compression_training": {"a": 1}}, "compression_training"),
        ({"train_micro_batch_size_per_gpu": "two"}, "train_micro_batch_size_per_gpu"),
    ],
)
def test_another_algorithm_is_refused(read, extra, word):
    assert word in refusal(read, JSON | extra)


def test_no_bf16_block_is_fp32(read):
    loaded = read({key: value for key, value in JSON.items() if key != "bf16"})
    assert loaded.config.contract.precision is Precision.FP32
    assert "fp32" in " ".join(loaded.warnings)


def test_without_a_model_the_flag_is_named(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(JSON))
    with pytest.raises(AutotuneError, match="--model"):
        load_any(tmp_path / "ds.json")


def test_flags_go_over_an_axolotl_file(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("base_model: tiny-qwen3\nlearning_rate: 1e-4\nmicro_batch_size: 1\n")
    start = StartingPoint(num_gpus=2, micro_batch_size=4, gradient_checkpointing=True)
    plan = load_any(path, start).config.plan(2)
    assert (plan.micro_batch_size, plan.recompute) == (4, Recompute.FULL)


def run(capsys, *words, code=0):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert caught.value.code == code, err
    return out, err


def test_import_writes_a_file_that_estimate_reads(tmp_path, capsys):
    source, target = tmp_path / "a.yaml", tmp_path / "run.yml"
    source.write_text(DEEPSPEED)
    _, err = run(capsys, "import", source, "--model", "tiny-qwen3", "--out", target)
    assert "read as accelerate" in err
    assert load_any(target).config.plan(4) == load_any(
        source, StartingPoint(model="tiny-qwen3")
    ).config.plan(4)
    target.write_text("mine")
    _, err = run(capsys, "import", source, "--model", "tiny-qwen3", "--out", target, code=2)
    assert "--force" in err and target.read_text() == "mine"


def test_estimate_takes_an_accelerate_file(tmp_path, capsys):
    source = tmp_path / "a.yaml"
    source.write_text(DEEPSPEED)
    out, err = run(capsys, "estimate", source, "--model", "qwen3-8b", "--gpus", 4, "--gpu-type",
                   "h100-sxm", "--seq-len", 4096, "--micro-batch-size", 2, "--json")  # fmt: skip
    document = json.loads(out)
    assert document["plan"]["zero_stage"] == 3 and document["plan"]["micro_batch_size"] == 2
    assert document["model"] == "qwen3-8b"
    assert "read as accelerate" in err and "learning_rate" in err
