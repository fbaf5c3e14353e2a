"""`autotune export`: what is written, what is warned of, what is refused."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from autotune.cli import main
from autotune.cli.export import _NAMES
from autotune.emit.targets import TARGETS

BASE = (
    "base_model: tiny-qwen3\nlearning_rate: 1e-4\nmicro_batch_size: 2\nsequence_len: 512\n"
    "gradient_accumulation_steps: 3\nsample_packing: true\ngradient_checkpointing: true\n"
    "datasets:\n  - {path: a.jsonl, type: completion}\n"
)
ZERO2 = "deepspeed: zero2.json\n"
FSDP2 = "fsdp_version: 2\nfsdp_config: {reshard_after_forward: false}\n"


@pytest.fixture
def export(capsys, tmp_path):
    def run(extra, *options, code=0):
        config = tmp_path / "best.yml"
        config.write_text(BASE + extra)
        with pytest.raises(SystemExit) as caught:
            main(["export", str(config), *map(str, options)])
        out, err = capsys.readouterr()
        assert caught.value.code == code, err
        assert code == 0 or out == ""
        return out, err

    return run


def test_the_verb_names_every_target():
    assert set(_NAMES) == set(TARGETS)


def test_text_goes_to_stdout_and_warnings_do_not(export):
    out, err = export(ZERO2, "--to", "deepspeed", "--gpus", 4)
    config = json.loads(out)
    assert config["zero_optimization"]["stage"] == 2
    assert config["train_batch_size"] == 2 * 3 * 4
    assert '"auto"' not in out
    for key in ("gradient_checkpointing: true", "base_model: tiny-qwen3", "sequence_len: 512",
                "sample_packing: true", "learning_rate", "datasets: 1"):  # fmt: skip
        assert key in err


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_file_stays_what_it_is(export, tmp_path, force):
    """It was replaced by a file, a device as well, or read until something was written to it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    _, err = export(ZERO2, "--to", "axolotl", "--gpus", 4, "--out", pipe, *force, code=2)
    assert "no regular file" in err and pipe.is_fifo()


def test_a_link_stays_one(export, tmp_path):
    link, real = tmp_path / "link.json", tmp_path / "real.json"
    real.write_text("{}")
    link.symlink_to(real.name)
    export(ZERO2, "--to", "deepspeed", "--gpus", 4, "--out", link, "--force")
    assert link.is_symlink() and "zero_optimization" in real.read_text()


def test_the_json_document_is_all_of_stdout(export, tmp_path):
    out, _ = export(
        ZERO2, "--to", "accelerate", "--gpus", 4, "--json", "--out", tmp_path / "a.yaml"
    )
    document = json.loads(out)
    assert set(document) == {
        "target", "plan", "world_size", "files", "written", "command", "lost", "warnings",
    }  # fmt: skip
    assert list(document["files"]) == ["a.yaml", "a.deepspeed.json"]
    assert set(document["written"].values()) == {"written"}
    assert document["lost"] == ["recompute"]
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["num_processes"] == 4


def test_another_file_is_never_replaced_unasked(export, tmp_path):
    target = tmp_path / "run.yaml"
    beside = tmp_path / "run.deepspeed.json"
    beside.write_text("mine")
    _, err = export(ZERO2, "--to", "accelerate", "--gpus", 2, "--out", target, code=2)
    assert "run.deepspeed.json" in err and "--force" in err
    assert beside.read_text() == "mine"
    assert not target.exists()  # all of them or none
    export(ZERO2, "--to", "accelerate", "--gpus", 2, "--out", target, "--force")
    assert json.loads(beside.read_text())["zero_optimization"]["stage"] == 2
    _, err = export(ZERO2, "--to", "accelerate", "--gpus", 2, "--out", target)
    assert err.count("unchanged") == 2


def test_a_link_to_nothing_is_somebody_s(export, tmp_path):
    link = tmp_path / "link.yml"
    for target in (tmp_path / "gone", link):  # and one to itself
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        _, err = export("", "--to", "axolotl", "--gpus", 2, "--out", link, code=2)
        assert "another file of that name" in err and link.is_symlink()


def test_several_files_need_a_place(export):
    _, err = export(ZERO2, "--to", "accelerate", "--gpus", 2, code=2)
    assert "accelerate.deepspeed.json" in err and "--out" in err


@pytest.mark.parametrize(
    ("extra", "options", "words"),
    [
        (FSDP2, ["--to", "deepspeed"], ["fsdp2", "accelerate"]),
        ("", ["--to", "deepspeed"], ["ddp"]),
        (ZERO2, ["--to", "torchtitan"], ["zero2", "no DeepSpeed"]),
        (ZERO2 + "context_parallel_size: 2\n", ["--to", "llamafactory"], ["context_parallel_size"]),
        ("context_parallel_size: 2\n", ["--to", "axolotl"], ["context_parallel_size", "DDP"]),
        ("context_parallel_size: 2\n", ["--to", "accelerate"], ["context_parallel_size", "DDP"]),
        (FSDP2, ["--to", "accelerate", "--device", "cpu"], ["fsdp2", "DDP"]),
        (
            FSDP2 + "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n",
            ["--to", "torchtitan"],
            ["adapter: lora"],
        ),
    ],
)
def test_what_a_target_cannot_be_is_refused(export, extra, options, words):
    _, err = export(extra, *options, "--gpus", 4, code=2)
    assert all(word in err for word in words), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--to", "nemo", "--gpus", "2"], "nemo"),
        (["--to", "axolotl"], "--gpus"),
        (["--to", "axolotl", "--gpus", "0"], "0"),
        (["--to", "axolotl", "--gpus", "2", "--out", "no/such/folder/x.yml"], "no/such/folder"),
        (["--to", "axolotl", "--gpus", "2", "--out", "."], "folder"),
        (["--to", "axolotl", "--gpus", "2", "--out", "x" * 300], "too long"),
    ],
)
def test_bad_input_is_one_message(export, options, word):
    _, err = export("", *options, code=2)
    assert word in err and "Traceback" not in err


def test_fsdp2_to_accelerate_names_what_the_script_must_say(export):
    out, err = export(FSDP2, "--to", "accelerate", "--gpus", 4)
    config = yaml.safe_load(out)
    assert config["fsdp_config"]["fsdp_reshard_after_forward"] is False
    assert config["fsdp_config"]["fsdp_activation_checkpointing"] is True
    assert config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == "Qwen3DecoderLayer"
    assert "micro_batch_size: 2, gradient_accumulation_steps: 3" in err


def test_packed_sequence_parallel_batches_become_accumulation_in_axolotl(export):
    extra = FSDP2 + "context_parallel_size: 2\n"
    out, err = export(extra, "--to", "axolotl", "--gpus", 4)
    config = yaml.safe_load(out)
    assert config["micro_batch_size"] == 1
    assert config["gradient_accumulation_steps"] == 6
    assert config["attn_implementation"] == "flash_attention_2"
    assert "micro_batch_size: 2 is written as 1" in err


def test_deepspeed_sequence_parallelism_leaves_the_shards_to_axolotl(export):
    out, _ = export(ZERO2 + "context_parallel_size: 2\n", "--to", "axolotl", "--gpus", 4)
    config = yaml.safe_load(out)
    assert config["context_parallel_size"] == 2
    assert not {"dp_shard_size", "dp_replicate_size"} & set(config)


def test_unused_keys_stay_in_axolotl_and_are_named_elsewhere(export):
    extra = FSDP2 + "neftune_noise_alpha: 5\n"
    out, _ = export(extra, "--to", "axolotl", "--gpus", 2)
    assert yaml.safe_load(out)["neftune_noise_alpha"] == 5
    for target in ("accelerate", "torchtitan"):
        _, err = export(extra, "--to", target, "--gpus", 2)
        assert "neftune_noise_alpha: 5" in err


def test_torchtitan_script(export):
    out, err = export(FSDP2, "--to", "torchtitan", "--gpus", 16)
    assert out.startswith("#!/bin/sh\n")
    assert "--nproc_per_node 8 --nnodes 2" in out
    assert "--parallelism.data_parallel_shard_degree 16" in out
    assert "--training.global_batch_size 96" in out
    assert out.rstrip().endswith("activation_checkpoint:full")
    assert "${TORCHTITAN_MODEL:?" in out and "TORCHTITAN_MODEL" in err


@pytest.mark.parametrize(("ranks", "words"), [(9, "3 --nnodes 3"), (12, "6 --nnodes 2")])
def test_torchtitan_starts_every_rank(export, ranks, words):
    out, _ = export(FSDP2, "--to", "torchtitan", "--gpus", ranks)
    assert f"--nproc_per_node {words} " in out


@pytest.mark.parametrize(("name", "told"), [("llama-3.1-405b", True), ("llama-3.1-70b", False)])
def test_a_model_that_torchtitan_trains_in_float8(capsys, tmp_path, name, told):
    config = tmp_path / "best.yml"
    config.write_text(BASE.replace("tiny-qwen3", name) + FSDP2)
    with pytest.raises(SystemExit) as caught:
        main(["export", str(config), "--to", "torchtitan", "--gpus", "16"])
    assert caught.value.code == 0
    assert ("float8" in capsys.readouterr().err) is told


def test_llamafactory_with_fsdp2_recomputes_once(export, tmp_path):
    target = tmp_path / "lf.yaml"
    _, err = export(FSDP2, "--to", "llamafactory", "--gpus", 2, "--out", target)
    config = yaml.safe_load(target.read_text())
    beside = yaml.safe_load((tmp_path / "lf.accelerate.yaml").read_text())
    assert config["disable_gradient_checkpointing"] is True
    assert beside["fsdp_config"]["fsdp_activation_checkpointing"] is True
    assert config["stage"] == "pt" and "datasets" in err and "sample_packing" in err


@pytest.mark.parametrize("target", ["axolotl", "accelerate", "llamafactory"])
@pytest.mark.parametrize(
    ("extra", "said"),
    [(FSDP2 + "bf16: true\n", True), (FSDP2 + "bf16: false\n", False), (ZERO2, False)],
)
def test_a_reduction_in_bf16_is_said(export, tmp_path, target, extra, said):
    """Ranks here reduce in fp32; accelerate's FSDP2 takes one type for all, unlike DeepSpeed."""
    out = tmp_path / "out.yaml"
    _, err = export(extra, "--to", target, "--gpus", 4, "--out", out)
    assert ("reduces gradients and returns the loss in bf16" in err) is said


@pytest.mark.parametrize("target", TARGETS)
def test_ranks_of_several_hosts_are_said(export, tmp_path, target):
    out, extra = tmp_path / "out.yaml", FSDP2 if target == "torchtitan" else ZERO2
    for gpus, said in ((8, False), (16, True)):
        _, err = export(extra, "--to", target, "--gpus", gpus, "--out", out, "--force")
        assert ("on one host" in err or "nodes" in err) is said
