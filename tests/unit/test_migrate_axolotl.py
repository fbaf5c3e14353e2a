"""FSDP1 of Axolotl's into FSDP2: meaning, comments and order kept; each loss named."""

from __future__ import annotations

import textwrap

import pytest
import yaml

from autotune.config import load_config
from autotune.config.keys import key_catalogue
from autotune.errors import AutotuneError
from autotune.migrate import Mesh, migrate
from tests.unit.migrate_configs import make_config

GUIDE_BEFORE = """\
base_model: Qwen/Qwen3-0.6B
fsdp_version: 1
fsdp_config:
  fsdp_offload_params: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Qwen3DecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sharding_strategy: FULL_SHARD
"""
GUIDE_AFTER = """\
base_model: Qwen/Qwen3-0.6B
fsdp_version: 2
fsdp_config:
  offload_params: false
  cpu_ram_efficient_loading: true
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: Qwen3DecoderLayer
  state_dict_type: FULL_STATE_DICT
  reshard_after_forward: true
"""
BASE = "base_model: tiny-llama\nlearning_rate: 2e-5\n"
FSDP_KEYS = ("fsdp", "fsdp_version", "fsdp_config", "fsdp_final_state_dict_type")


@pytest.fixture
def file(tmp_path):
    def write(text, base=BASE):
        path = tmp_path / "config.yml"
        path.write_bytes((base + textwrap.dedent(text)).encode())
        return path

    return write


def said(migration):
    return " ".join(migration.warnings)


def test_the_guide_s_own_example(file):
    migration = migrate(file(GUIDE_BEFORE, base=""))
    assert migration.after == GUIDE_AFTER
    assert migration.warnings == ()
    lines = migration.diff.splitlines()
    assert lines[0].startswith("--- ") and lines[1].startswith("+++ ")
    assert "-  fsdp_sharding_strategy: FULL_SHARD" in lines
    assert "+  reshard_after_forward: true" in lines


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 80 else pytest.mark.slow) for n in range(500)]
)
def test_any_config(seed, file):
    """Nothing but FSDP changes, no comment goes, the meaning stays; twice is as good as once."""
    text, comments = make_config(seed)
    path = file(text, base="")
    migration = migrate(path)
    before, after = yaml.safe_load(text), yaml.safe_load(migration.after)
    assert {k: v for k, v in before.items() if k not in FSDP_KEYS} == {
        k: v for k, v in after.items() if k not in FSDP_KEYS
    }
    assert [key for key in before if key not in FSDP_KEYS] == [
        key for key in after if key not in FSDP_KEYS
    ]
    for comment in comments:
        assert migration.after.count(comment) == 1
    assert after["fsdp_version"] == 2 and "fsdp" not in after
    assert not set(after["fsdp_config"]) & set(key_catalogue().fsdp1_keys)
    was = load_config(path)
    path.write_text(migration.after)
    now = load_config(path)
    assert now.plan(4) == was.plan(4)
    assert not any("FSDP1" in warning or "fsdp_" in warning for warning in now.warnings)
    again = migrate(path)
    assert not again.changed and again.diff == ""


def test_the_generator_makes_every_kind():
    texts = "".join(make_config(seed)[0] for seed in range(80))
    for words in ("fsdp: [", "fsdp:\n- ", "fsdp: full_shard", "fsdp_config: {", "offload", "NO_SHA",
                  "  fsdp_use_orig", "  use_orig", "hybrid_shard_zero2", "n: 1\n"):  # fmt: skip
        assert words in texts


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_and_untouched_lines_stay(file, newline):
    text = "datasets:\n    -   path:  'x'\nfsdp:\n- full_shard\nval_set_size:   0.10\n"
    path = file(text.replace("\n", newline), base="")
    assert migrate(path).after == (
        "datasets:\n    -   path:  'x'\nfsdp_version: 2\nfsdp_config:\n"
        "  reshard_after_forward: true\nval_set_size:   0.10\n"
    ).replace("\n", newline)


def test_every_removed_key_is_named_with_its_reason(file):
    removed = {
        key: "true" for key in key_catalogue().fsdp1_keys if key != "sharding_strategy"
    }  # fmt: skip
    lines = "".join(f"  fsdp_{key}: {value}\n" for key, value in removed.items())
    migration = migrate(file(f"fsdp_config:\n{lines}"))
    for key in removed:
        (line,) = [line for line in migration.warnings if f"fsdp_{key} removed" in line]
        assert key_catalogue().fsdp1_keys[key] in line
        # Axolotl's schema has these two of FSDP1; the others it dropped without a word.
        ignored = key not in ("sync_module_states", "use_orig_params")
        assert ("FSDP1 ignored it here, too" in line) == ignored


STRATEGY = "fsdp_config:\n  fsdp_sharding_strategy: "


@pytest.mark.parametrize(
    ("extra", "as_written", "reshard", "words"),
    [
        (STRATEGY + "SHARD_GRAD_OP\n", False, True, "fsdp_sharding_strategy: SHARD_GRAD_OP in"),
        (STRATEGY + "SHARD_GRAD_OP\n", True, False, ""),
        (STRATEGY + "2\n", True, False, ""),
        (STRATEGY + "'2'\n", True, False, ""),
        (STRATEGY + "shard_grad_op\n", False, True, "was ignored by Axolotl"),
        ("fsdp: [shard_grad_op]\n" + STRATEGY + "FULL_SHARD\n", False, False, "FULL_SHARD in"),
        ("fsdp: [shard_grad_op]\n" + STRATEGY + "SHARD_GRAD_OP\n", False, False, ""),
        (STRATEGY + "NO_SHARD\n", False, True, "NO_SHARD in fsdp_config was ignored"),
        (STRATEGY + "HYBRID_SHARD\n", False, True, "give --gpus and --nodes"),
    ],
)
def test_a_strategy_that_axolotl_ignored(file, extra, as_written, reshard, words):
    migration = migrate(file(extra), as_written=as_written)
    assert yaml.safe_load(migration.after)["fsdp_config"]["reshard_after_forward"] is reshard
    assert words in said(migration)
    assert bool(words) == ("ignored by Axolotl" in said(migration))


@pytest.mark.parametrize(
    ("extra", "reshard"),
    [
        ("fsdp: [hybrid_shard, auto_wrap]\n", True),
        ("fsdp: [hybrid_shard_zero2]\nfsdp_config: {offload_params: false}\n", False),
        ("fsdp: [hybrid_shard]\ndp_shard_size: 8\n", True),
        (STRATEGY + "HYBRID_SHARD\n", True),
    ],
)
def test_hybrid_strategies_become_a_mesh(file, extra, reshard):
    path = file(extra)
    migration = migrate(path, mesh=Mesh(num_gpus=16, num_nodes=2))
    path.write_text(migration.after)
    plan = load_config(path).plan(16)
    assert (plan.dp_replicate, plan.dp_shard, plan.reshard_after_forward) == (2, 8, reshard)
    assert "dp_replicate_size: 2" in said(migration)
    assert not migrate(path).changed


def test_hybrid_as_written_needs_the_mesh(file):
    with pytest.raises(AutotuneError, match="--gpus and --nodes"):
        migrate(file(STRATEGY + "HYBRID_SHARD_ZERO2\n"), as_written=True)
    migration = migrate(
        file(STRATEGY + "HYBRID_SHARD_ZERO2\n"),
        as_written=True,
        mesh=Mesh(num_gpus=8, num_nodes=4),
    )
    values = yaml.safe_load(migration.after)
    assert (values["dp_replicate_size"], values["dp_shard_size"]) == (4, 2)
    assert values["fsdp_config"] == {"reshard_after_forward": False}


@pytest.mark.parametrize(
    ("extra", "section", "words"),
    [
        ("optimizer: adamw_bnb_8bit\nfsdp: [full_shard]\n", {}, "now adamw_torch_8bit"),
        (
            "load_in_4bit: true\nfsdp_config: {fsdp_cpu_ram_efficient_loading: true}\n",
            {"cpu_ram_efficient_loading": False},
            "once a rank",
        ),
        (
            "fsdp_config: {state_dict_type: LOCAL_STATE_DICT}\n",
            {"state_dict_type": "SHARDED_STATE_DICT"},
            "LOCAL_STATE_DICT, which FSDP2 does not have",
        ),
        (
            "optimizer: q_galore_adamw8bit\nfsdp_config: {fsdp_use_orig_params: true}\n",
            {"use_orig_params": True},
            "",
        ),
        (
            "fsdp_config: {auto_wrap_policy: SIZE_BASED_WRAP, min_num_params: 5}\n",
            {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5},
            "autotune does not",
        ),
        ("fsdp_config: {fsdp_state_dict_type:, offload_params: true}\n",
         {"offload_params": True}, ""),
        ("fsdp_config: {offload_params: true, fsdp_offload_params: true}\n",
         {"offload_params": True}, "fsdp_offload_params removed: offload_params says the same."),
        ("fsdp_config:\n  version: 1\n", {}, ""),
        ("fsdp: [full_shard]\nfsdp_config:\nfsdp_version:\n", {}, ""),
    ],
)  # fmt: skip
def test_what_fsdp2_needs_otherwise(file, extra, section, words):
    migration = migrate(file(extra))
    values = yaml.safe_load(migration.after)
    assert values["fsdp_config"] == section | {"reshard_after_forward": True}
    assert values["fsdp_version"] == 2
    assert words in said(migration)


def test_fsdp2_with_old_spellings_is_cleaned(file):
    text = "fsdp_version: 2\nfsdp_config:\n  fsdp_reshard_after_forward: false\n  {}: true\n"
    migration = migrate(file(text.format("fsdp_forward_prefetch")))
    assert yaml.safe_load(migration.after)["fsdp_config"] == {"reshard_after_forward": False}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("", "no FSDP in it"),
        ("deepspeed: zero2.json\n", "no FSDP in it"),
        ("fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\n", ""),
    ],
)
def test_nothing_to_migrate(file, extra, words):
    migration = migrate(file(extra), mesh=None)
    assert not migration.changed and words in said(migration)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("fsdp: [no_shard]\n", "It|it is DDP"),
        ("fsdp: [full_shard, hybrid_shard]\n", "one strategy alone"),
        ("fsdp: [ful_shard]\n", "full_shard"),
        ("fsdp: [hybrid_shard]\n", "--gpus N --nodes M"),
        ("fsdp_config: {fsdp_offlod_params: true}\n", "Nearest: offload_params"),
        ("fsdp_config: {sharding_strategy: HALF}\n", "HYBRID_SHARD_ZERO2"),
        ("fsdp_config: {offload_params: 3}\n", "true or false"),
        ("fsdp_config: [full_shard]\n", "mapping"),
        ("fsdp_config: {transformer_layer_cls_to_wrap: [A, B]}\n", "as A,B"),
        ("fsdp_config: {fsdp_state_dict_type: {a: 1}}\n", "state_dict_type"),
        ("fsdp_config: {auto_wrap_policy: NO_WRAP}\n", "TRANSFORMER_BASED_WRAP"),
        ("fsdp_version: 3\nfsdp_config: {offload_params: true}\n", "Write 2"),
        ("fsdp_version: 1\n", "fsdp_config is empty"),
        ("fsdp_config: {offload_params: true, fsdp_offload_params: false}\n", "contradict"),
        ("fsdp: [full_shard]\ndeepspeed: zero2.json\n", "exclude each other"),
        ("rl: dpo\nload_in_4bit: true\nfsdp: [full_shard]\n", "Use DeepSpeed"),
        ("fsdp: &f [full_shard]\nx: *f\n", "anchor"),
        ("fsdp: [full_shard\n", "not valid YAML"),
        (
            "fsdp_final_state_dict_type: FULL_STATE_DICT\n"
            "fsdp_config: {final_state_dict_type: SHARDED_STATE_DICT}\n",
            "contradict",
        ),
    ],
)
def test_refused_with_one_message(file, extra, words):
    with pytest.raises(AutotuneError, match=words) as error:
        migrate(file(extra))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("fsdp: [full_shard]\n", "not used"),
        ("", "no FSDP"),
    ],
)
def test_a_mesh_that_nothing_needs(file, extra, words):
    assert words in said(migrate(file(extra), mesh=Mesh(num_gpus=4, num_nodes=2)))


def test_a_mesh_that_contradicts_the_file(file):
    with pytest.raises(AutotuneError, match="dp_replicate_size: 4 is not what"):
        migrate(
            file("fsdp: [hybrid_shard]\ndp_replicate_size: 4\n"), mesh=Mesh(num_gpus=8, num_nodes=2)
        )
    with pytest.raises(AutotuneError, match="evenly"):
        Mesh(num_gpus=9, num_nodes=2)


@pytest.mark.parametrize("text", ["x: 1\ny: 2\n", "- a\n", "", "just words\n"])
def test_no_configuration_at_all(file, text):
    with pytest.raises(AutotuneError):
        migrate(file(text, base=""))
