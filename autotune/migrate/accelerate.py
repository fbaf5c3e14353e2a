"""accelerate's YAML: its `fsdp_config` into the one FSDP2 takes.

What accelerate 1.15 does is in its commands/launch.py (flags and their defaults), utils/launch.py
(the environment they make) and utils/dataclasses.py (FullyShardedDataParallelPlugin).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.config.fsdp import NO_SHARD, STRATEGIES, strategy_name
from autotune.config.keys import key_catalogue
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.migrate.document import Document
from autotune.migrate.mesh import Mesh
from autotune.migrate.notes import Notes
from autotune.migrate.values import check_values

_CONFIG = "fsdp_config"
_RESHARD = "reshard_after_forward"
_KNOWN = frozenset({
    "version", _RESHARD, "offload_params", "auto_wrap_policy", "transformer_layer_cls_to_wrap",
    "min_num_params", "state_dict_type", "cpu_ram_efficient_loading", "activation_checkpointing",
    "activation_checkpointing_offload", "ignored_modules",
})  # fmt: skip
_FULL_SHARD = "full_shard"


def is_accelerate(values: Mapping[str, Any]) -> bool:
    """Say whether a file is accelerate's: Axolotl has neither key."""
    return "distributed_type" in values or "compute_environment" in values


def migrate_accelerate(
    document: Document, notes: Notes, *, mesh: Mesh | None, as_written: bool
) -> None:
    """Change a document of accelerate's to FSDP2.

    Args:
        document: Changed in place.
        notes: Filled.
        mesh: Of a hybrid strategy; without it, the file's `num_processes` and `num_machines`.
        as_written: Take `fsdp_reshard_after_forward`, which FSDP1 ignores, at its word.

    Raises:
        AutotuneError: a contradiction, or what FSDP2 has no counterpart of.
    """
    where = str(document.path)
    top = Section(document.values, where)
    section = top.section(_CONFIG)
    if top.text("distributed_type") != "FSDP" or section is None or not section.unread():
        notes.add("no FSDP in it (distributed_type: FSDP with fsdp_config), so nothing to migrate.")
        return
    check_values(section)
    given = section.unread()
    values = _without_prefix(given, section)
    fsdp = Section(values, section.where)
    version = fsdp.integer("version", 1)
    if version not in (1, 2):
        raise fsdp.error("version", "Known: 1, 2.")
    strategy = _strategy(fsdp, version, notes, as_written)
    reshard, hybrid = STRATEGIES[strategy]
    sizes = _sizes(top, mesh, where) if hybrid else None
    _move_keys(document, given, notes, reshard if version == 1 else None)
    if "version" not in values:
        document.add(_CONFIG, "fsdp_version", 2)
    if version == 1:
        if values.get(_RESHARD) is None and values.get("sharding_strategy") is None:
            document.add(_CONFIG, "fsdp_reshard_after_forward", reshard)
        if values.get("state_dict_type") is None:
            # FSDP1's default; FSDP2's is SHARDED_STATE_DICT.
            document.add(_CONFIG, "fsdp_state_dict_type", "FULL_STATE_DICT")
    if sizes:
        document.add_above(_CONFIG, {"parallelism_config": sizes})
        notes.add(
            "parallelism_config written: copies between nodes, shards inside one "
            f"({', '.join(f'{key.removeprefix(_PREFIX)} {size}' for key, size in sizes.items())})."
        )
    elif mesh:
        notes.add("--gpus and --nodes are not used: there is no hybrid strategy to lay out.")


_PREFIX = "parallelism_config_"


def _without_prefix(given: Mapping[str, Any], section: Section) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in given.items():
        bare = key.removeprefix("fsdp_")
        if values.get(bare) is not None and value is not None:
            raise AutotuneError(
                f"{section.where}: {bare} and fsdp_{bare} are the same key. Keep fsdp_{bare}."
            )
        values[bare] = value if value is not None else values.get(bare)
    return values


def _strategy(fsdp: Section, version: int, notes: Notes, as_written: bool) -> str:
    """Return the FSDP1 strategy that the file runs, or on FSDP2 the one of the same meaning."""
    listed = fsdp.raw("sharding_strategy")
    stated = fsdp.raw(_RESHARD)
    if version == 2:
        if stated is not None and not isinstance(stated, bool):
            raise fsdp.error(f"fsdp_{_RESHARD}", "FSDP2 takes true or false.")
        return "shard_grad_op" if stated is False else _FULL_SHARD
    runs = _FULL_SHARD if listed is None else _named(listed, "sharding_strategy", fsdp)
    if stated is None or isinstance(stated, bool):
        # FSDP1 refuses a boolean before anything runs, so that whoever wrote it means FSDP2.
        return runs if stated is None else ("shard_grad_op", _FULL_SHARD)[stated]
    asked = _named(stated, _RESHARD, fsdp)
    if as_written:
        runs = asked
    elif asked != runs:
        notes.add(
            f"fsdp_{_RESHARD}: {stated} was ignored: for FSDP1 `accelerate launch` sets "
            f"fsdp_sharding_strategy, {runs.upper()} where the file says nothing, and that counts. "
            "--as-written takes the key at its word."
        )
    return runs


def _named(value: object, key: str, fsdp: Section) -> str:
    name = strategy_name(value, Section({"sharding_strategy": value}, fsdp.where))
    if name == NO_SHARD:
        raise fsdp.error(key, "FSDP2 has no counterpart: it is DDP. Write distributed_type: "
                         "MULTI_GPU and remove fsdp_config.")  # fmt: skip
    return name


def _sizes(top: Section, mesh: Mesh | None, where: str) -> dict[str, int] | None:
    """Return `parallelism_config` of a hybrid strategy; None where the file has one."""
    if top.has("parallelism_config"):
        return None
    if mesh is None:
        gpus, nodes = (
            top.integer("num_processes", minimum=1),
            top.integer("num_machines", minimum=1),
        )
        if gpus is None or nodes is None:
            raise AutotuneError(
                f"{where}: FSDP2 must be told the copies of a hybrid strategy. Give --gpus and "
                "--nodes, or write num_processes (all GPUs) and num_machines (nodes)."
            )
        mesh = Mesh(num_gpus=gpus, num_nodes=nodes)
    return {
        f"{_PREFIX}dp_replicate_size": mesh.dp_replicate,
        f"{_PREFIX}dp_shard_size": mesh.dp_shard,
    }


def _move_keys(
    document: Document, given: Mapping[str, Any], notes: Notes, reshard: bool | None
) -> None:
    """Take FSDP1's keys out and give the rest its values of FSDP2.

    Args:
        document: Changed in place.
        given: `fsdp_config` as in the file.
        notes: Filled.
        reshard: None of a file that is for FSDP2 already.
    """
    removed = key_catalogue().fsdp1_keys
    has_reshard = any(key.removeprefix("fsdp_") == _RESHARD for key in given)
    unknown = []
    for key, value in given.items():
        bare = key.removeprefix("fsdp_")
        if bare == "version" and value != 2:
            document.set_value(_CONFIG, key, 2)
        elif bare == "sharding_strategy" and reshard is not None and not has_reshard:
            document.rename(_CONFIG, key, f"fsdp_{_RESHARD}")
            document.set_value(_CONFIG, key, reshard)
        elif bare in removed:
            document.remove(_CONFIG, key)
            notes.removed(key, removed[bare], ignored=False)
        elif bare == _RESHARD and reshard is not None and value is not reshard:
            document.set_value(_CONFIG, key, reshard)
        elif bare == "state_dict_type" and value == "LOCAL_STATE_DICT":
            document.set_value(_CONFIG, key, "SHARDED_STATE_DICT")
            notes.add(f"{key}: LOCAL_STATE_DICT, which FSDP2 does not have, is now "
                      "SHARDED_STATE_DICT.")  # fmt: skip
        elif bare == "state_dict_type" and value is None and reshard is not None:
            document.set_value(_CONFIG, key, "FULL_STATE_DICT")
        elif bare not in _KNOWN:
            unknown.append(key)
    if unknown:
        notes.add(f"kept, though accelerate 1.15 knows no such FSDP key: {', '.join(unknown)}.")
