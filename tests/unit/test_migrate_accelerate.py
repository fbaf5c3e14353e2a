"""accelerate's FSDP1 files into FSDP2's; tests/conformance lets accelerate read the results."""

from __future__ import annotations

import random

import pytest
import yaml

from autotune.config.keys import key_catalogue
from autotune.errors import AutotuneError
from autotune.migrate import Mesh, migrate
from tests.unit.migrate_configs import CHOICES

HEAD = """\
compute_environment: LOCAL_MACHINE   # made by `accelerate config`
debug: false
distributed_type: FSDP
"""
TAIL = """\
# machines
machine_rank: 0
num_machines: 2
num_processes: 8
mixed_precision: bf16
"""
BEFORE = f"""{HEAD}fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true   # saves host memory
  fsdp_forward_prefetch: false
  fsdp_offload_params: false
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_use_orig_params: true
{TAIL}"""
AFTER = f"""{HEAD}fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true   # saves host memory
  fsdp_offload_params: false
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
{TAIL}"""


@pytest.fixture
def file(tmp_path):
    def write(config="", head=HEAD, tail=TAIL):
        path = tmp_path / "accelerate.yaml"
        path.write_text(f"{head}{config}{tail}")
        return path

    return write


def section(migration):
    return yaml.safe_load(migration.after)["fsdp_config"]


def test_a_file_of_accelerate_config(file):
    path = file(BEFORE, head="", tail="")
    migration = migrate(path)
    assert (migration.kind, migration.after) == ("accelerate", AFTER)
    for key in ("fsdp_backward_prefetch", "fsdp_forward_prefetch", "fsdp_sync_module_states",
                "fsdp_use_orig_params"):  # fmt: skip
        assert sum(f"{key} removed" in warning for warning in migration.warnings) == 1
    assert len(migration.warnings) == 4
    path.write_text(migration.after)
    assert not migrate(path).changed


@pytest.mark.parametrize(
    ("config", "as_written", "reshard", "words"),
    [
        ("{fsdp_sharding_strategy: FULL_SHARD}", False, True, ""),
        ("{fsdp_sharding_strategy: 2}", False, False, ""),
        ("{sharding_strategy: shard_grad_op}", False, False, ""),
        ("{fsdp_offload_params: true}", False, True, ""),
        ("{fsdp_reshard_after_forward: FULL_SHARD}", False, True, ""),
        ("{fsdp_reshard_after_forward: SHARD_GRAD_OP}", False, True, "was ignored"),
        ("{fsdp_reshard_after_forward: SHARD_GRAD_OP}", True, False, ""),
        (
            "{fsdp_sharding_strategy: SHARD_GRAD_OP, fsdp_reshard_after_forward: FULL_SHARD}",
            False, False, "was ignored",
        ),
        ("{fsdp_version: 1, fsdp_reshard_after_forward: false}", False, False, ""),
    ],
)  # fmt: skip
def test_strategies(file, config, as_written, reshard, words):
    migration = migrate(file(f"fsdp_config: {config}\n"), as_written=as_written)
    found = section(migration)
    assert {key.removeprefix("fsdp_"): value for key, value in found.items()} == {
        "version": 2, "reshard_after_forward": reshard, "state_dict_type": "FULL_STATE_DICT",
    } | ({"offload_params": True} if "offload" in config else {})  # fmt: skip
    said = [warning for warning in migration.warnings if "removed" not in warning]
    assert bool(said) == bool(words) and words in " ".join(said)


@pytest.mark.parametrize(
    ("strategy", "reshard"), [("HYBRID_SHARD", True), ("5", False), ("'5'", False)]
)
def test_hybrid_strategies_take_the_mesh_of_the_file_or_of_the_flags(file, strategy, reshard):
    config = f"fsdp_config:\n  fsdp_sharding_strategy: {strategy}\n"
    for mesh, sizes in ((None, (2, 4)), (Mesh(num_gpus=8, num_nodes=4), (4, 2))):
        migration = migrate(file(config), mesh=mesh)
        values = yaml.safe_load(migration.after)
        assert tuple(values["parallelism_config"].values()) == sizes
        assert values["fsdp_config"]["fsdp_reshard_after_forward"] is reshard
    with pytest.raises(AutotuneError, match="--gpus and"):
        migrate(file(config, tail=""))
    given = "parallelism_config: {parallelism_config_dp_replicate_size: 4}\n"
    kept = migrate(file(config + given))
    assert (
        yaml.safe_load(kept.after)["parallelism_config"]
        == yaml.safe_load(given)["parallelism_config"]
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("fsdp_config: {fsdp_sharding_strategy: NO_SHARD}\n", "MULTI_GPU"),
        ("fsdp_config: {fsdp_reshard_after_forward: NO_SHARD}\n", "MULTI_GPU"),
        ("fsdp_config: {fsdp_sharding_strategy: HALF}\n", "Known: FULL_SHARD"),
        ("fsdp_config: {fsdp_version: 3}\n", "Known: 1, 2"),
        ("fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: FULL}\n", "true or false"),
        ("fsdp_config: [a]\n", "mapping"),
        ("fsdp_config: {fsdp_version: 2, fsdp_state_dict_type: {a: 1}}\n", "state_dict_type"),
        ("fsdp_config: {fsdp_transformer_layer_cls_to_wrap: [A]}\n", "as A,B"),
        ("fsdp_config: {offload_params: true, fsdp_offload_params: true}\n", "same key"),
    ],
)
def test_refused(file, config, words):
    with pytest.raises(AutotuneError, match=words):
        migrate(file(config))


def test_a_type_that_is_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("distributed_type: [FSDP]\nfsdp_config: {fsdp_version: 1}\n")
    with pytest.raises(AutotuneError, match=r"distributed_type.*Write text"):
        migrate(path)


@pytest.mark.parametrize(
    "config", ["", "fsdp_config: {}\n", "distributed: 1\n", "deepspeed_config: {zero_stage: 2}\n"]
)
def test_nothing_to_migrate(file, config):
    migration = migrate(file(config))
    assert not migration.changed and "nothing to migrate" in migration.warnings[0]


def test_unknown_keys_are_kept_and_named(file):
    migration = migrate(file("fsdp_config: {fsdp_nope: 1}\n"))
    assert section(migration)["fsdp_nope"] == 1
    assert "fsdp_nope" in migration.warnings[0]


@pytest.mark.parametrize("seed", range(40))
def test_any_config(seed, file):
    rng = random.Random(seed)
    choices = {key: values for key, values in CHOICES.items() if key != "sharding_strategy"}
    choices["sharding_strategy"] = (
        "FULL_SHARD",
        "SHARD_GRAD_OP",
        "HYBRID_SHARD",
        "2",
        "full_shard",
    )
    choices["state_dict_type"] = ("FULL_STATE_DICT", "LOCAL_STATE_DICT")
    names = rng.sample(sorted(choices), rng.randint(1, len(choices)))
    lines = "".join(
        f"  fsdp_{name}: {rng.choice(choices[name])}   # of {name}.\n" for name in names
    )
    path = file(f"fsdp_config:\n{lines}")
    migration = migrate(path)
    found = section(migration)
    assert found["fsdp_version"] == 2 and isinstance(found["fsdp_reshard_after_forward"], bool)
    assert not {key.removeprefix("fsdp_") for key in found} & set(key_catalogue().fsdp1_keys)
    assert all(f"of {name}." in migration.after for name in names)
    assert migration.after.startswith(HEAD) and migration.after.endswith(TAIL)
    path.write_text(migration.after)
    assert not migrate(path).changed
