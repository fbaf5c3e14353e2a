"""Keys of a file that exclude one another on several ranks are refused with their code."""

from __future__ import annotations

import pytest

from autotune.cli import main
from autotune.config import load_config
from autotune.config.combinations import FILE_RULES
from autotune.errors import AutotuneError

BASE = "base_model: tiny-qwen3\nlearning_rate: 1e-4\n"
FSDP2 = "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\n"
FSDP1 = "fsdp_version: 1\nfsdp_config: {fsdp_offload_params: false}\n"
# code: what is refused, and the same made right.
EXAMPLES = {
    "AT151": [
        (f"deepspeed: zero2\n{FSDP2}", FSDP2),
        ("deepspeed: zero2\nfsdp: [full_shard]\n", "deepspeed: zero2\n"),
    ],
    "AT152": [
        ("fp32_norms: true\n", f"fp32_norms: true\n{FSDP2}"),
        (f"fp8_enable_fsdp_float8_all_gather: true\n{FSDP1}", FSDP1),
        ("fp32_norms: true\ndeepspeed: zero2\n", "fp32_norms: false\ndeepspeed: zero2\n"),
    ],
    "AT153": [
        (
            "selective_checkpointing: true\ngradient_checkpointing: false\n",
            "gradient_checkpointing: true\nselective_checkpointing: false\n",
        ),
        ("selective_checkpointing: true\n", "gradient_checkpointing: true\n"),
    ],
    "AT154": [
        ("torch_compile_mode: max-autotune\n", "torch_compile: true\n"),
        ("torch_compile_options: {epilogue_fusion: true}\n", "torch_compile: true\n"),
    ],
    "AT155": [("deepcompile: true\n", "deepcompile: false\n")],
    "AT156": [
        ("relora: true\ndeepspeed: zero1\n", "relora: false\ndeepspeed: zero1\n"),
        (f"relora: true\n{FSDP2}", FSDP2),
    ],
    "AT157": [
        ("device_map: auto\ndeepspeed: zero3\n", "deepspeed: zero3\n"),
        (f"gpu_memory_limit: 20GiB\n{FSDP2}", FSDP2),
    ],
    "AT158": [("expert_parallel_size: 2\n", "expert_parallel_size: 1\n")],
}


def test_every_rule_has_an_example():
    assert list(EXAMPLES) == list(FILE_RULES)


@pytest.mark.parametrize(
    ("code", "wrong", "right"),
    [(code, *pair) for code, pairs in EXAMPLES.items() for pair in pairs],
)
def test_refused_with_the_code_and_accepted_when_mended(tmp_path, code, wrong, right):
    file = tmp_path / "c.yml"
    file.write_text(BASE + right)
    load_config(file)
    file.write_text(BASE + wrong)
    with pytest.raises(AutotuneError, match=rf"c\.yml: \[{code}\] ") as caught:
        load_config(file)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ("context_parallel_size: 3\n", "AT102"),
        (f"dp_shard_size: 4\ndp_replicate_size: 4\n{FSDP2}", "AT101"),
        ("tensor_parallel_size: 2\n", "AT115"),
        ("deepspeed: zero3_bf16_hpz\nbf16: true\n", "AT150"),
        ("context_parallel_size: 2\nsample_packing: true\nheads_k_stride: 3\n", "AT122"),
    ],
)
def test_layouts_that_no_launch_should_see(tmp_path, capsys, keys, code):
    file = tmp_path / "c.yml"
    (tmp_path / "d.txt").write_text("words")
    file.write_text(BASE + keys)
    command = ["train", str(file), "--device", "cpu", "--gpus", "8", "--data"]
    with pytest.raises(SystemExit) as caught:
        main([*command, str(tmp_path / "d.txt"), "--output-dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and f"[{code}]" in err, err
    assert not (tmp_path / "out").exists()
