"""Axolotl's FSDP keys: the list `fsdp`, `fsdp_config` with and without prefix, into FSDP2's."""

from __future__ import annotations

from typing import Any

from autotune.config.fsdp import (
    NO_SHARD,
    STRATEGIES,
    VERSION_KEYS,
    FsdpKeys,
    read_fsdp_keys,
    strategy_name,
)
from autotune.config.keys import key_catalogue
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.migrate.document import Document
from autotune.migrate.mesh import Mesh
from autotune.migrate.notes import Notes
from autotune.migrate.values import check_values

_CONFIG = "fsdp_config"
_STATE_DICT = "fsdp_final_state_dict_type"
_SIZES = ("dp_replicate_size", "dp_shard_size")
# Axolotl 0.19.0, utils/schemas/validation.py: check_fsdp2_w_8bit_optimizer.
_OPTIMIZERS = {"adamw_8bit": "adamw_torch_8bit", "adamw_bnb_8bit": "adamw_torch_8bit"}
# The same file, check_fsdp_version_w_rl: FSDP2 with one of these and a quantised model.
_PREFERENCE = ("dpo", "kto", "orpo", "ipo")


def migrate_axolotl(
    document: Document, notes: Notes, *, mesh: Mesh | None, as_written: bool
) -> None:
    """Change a document of Axolotl's to FSDP2.

    Args:
        document: Changed in place.
        notes: Filled.
        mesh: Of a hybrid strategy.
        as_written: Take `sharding_strategy` in `fsdp_config`, which Axolotl ignores, at its word.

    Raises:
        AutotuneError: a contradiction, an unknown FSDP key, or what FSDP2 has no counterpart of.
    """
    where = str(document.path)
    values = document.values
    sizes = _sizes(mesh) if mesh else {}
    top = Section({**sizes, **{key: v for key, v in values.items() if v is not None}}, where)
    keys = read_fsdp_keys(top, where)
    if keys is None:
        notes.add("no FSDP in it, so nothing to migrate.")
        return
    _check(top, keys, where)
    asked = keys.values.get("sharding_strategy")
    reshard, hybrid = keys.reshard, keys.hybrid
    if asked is not None:
        asked = strategy_name(asked, keys.section)
        spelling = next(key for key in values[_CONFIG] if key.endswith("sharding_strategy"))
        said = f"{spelling}: {asked.upper()}"
        reshard, hybrid = _ignored_strategy(asked, said, keys, notes, mesh, as_written)
    if hybrid and not any(top.has(size) for size in _SIZES):
        raise AutotuneError(
            f"{where}: {asked or 'fsdp'}: FSDP2 must be told the copies of a hybrid strategy. Give "
            "--gpus and --nodes, or write dp_replicate_size (nodes) and dp_shard_size (GPUs a node)"
            " into the file."
        )
    _move_keys(document, keys, notes, reshard)
    if mesh and not hybrid:
        notes.add("--gpus and --nodes are not used: there is no hybrid strategy in it.")
    elif mesh:
        _write_sizes(document, sizes, notes)
    _change_what_fsdp2_refuses(document, values, notes)


def _sizes(mesh: Mesh) -> dict[str, int]:
    return {"dp_replicate_size": mesh.dp_replicate, "dp_shard_size": mesh.dp_shard}


def _check(top: Section, keys: FsdpKeys, where: str) -> None:
    check_values(keys.section)
    if top.has("deepspeed"):
        raise AutotuneError(
            f"{where}: deepspeed and FSDP exclude each other (Axolotl would drop deepspeed in "
            "silence). Remove one of them, then run this again."
        )
    if keys.values.get("auto_wrap_policy") == "NO_WRAP":
        raise keys.section.error("auto_wrap_policy", "Axolotl refuses it. Write "
                                 "TRANSFORMER_BASED_WRAP.")  # fmt: skip
    quantised = [key for key in ("load_in_4bit", "load_in_8bit") if top.raw(key) is True]
    if quantised and top.raw("rl") in _PREFERENCE:
        raise AutotuneError(
            f"{where}: rl: {top.raw('rl')} with {quantised[0]} does not run on FSDP2 (Axolotl "
            "refuses it). Use DeepSpeed, or leave this file at fsdp_version: 1."
        )


def _ignored_strategy(
    asked: str, said: str, keys: FsdpKeys, notes: Notes, mesh: Mesh | None, as_written: bool
) -> tuple[bool, bool]:
    """Return (reshard_after_forward, hybrid) where `fsdp_config` names a strategy.

    Axolotl has no such key: what runs is what the list `fsdp` says, full sharding without one.
    """
    if asked == NO_SHARD:
        if as_written:
            raise keys.section.error("sharding_strategy", "FSDP2 has no counterpart: it is DDP. "
                                     "Remove fsdp and fsdp_config.")  # fmt: skip
        reshard, hybrid = keys.reshard, False
    else:
        reshard, hybrid = STRATEGIES[asked]
    if as_written:
        return reshard, hybrid or keys.hybrid
    runs = f"reshard_after_forward: {str(keys.reshard).lower()}"
    if asked == NO_SHARD or reshard is not keys.reshard:
        notes.add(
            f"{said} in fsdp_config was ignored by Axolotl, which has no such key. {runs} is what "
            "the file trained with; --as-written takes the key at its word."
        )
    if not hybrid or keys.hybrid:
        return keys.reshard, keys.hybrid
    if mesh:
        notes.add(
            f"{said} in fsdp_config was ignored by Axolotl, which has no such key: it sharded over "
            "all GPUs. The copies asked for are written now, as --nodes is given."
        )
        return keys.reshard, True
    notes.add(
        f"{said} in fsdp_config was ignored by Axolotl, which has no such key: the file sharded "
        "over all GPUs, and still does. For copies between nodes give --gpus and --nodes."
    )
    return keys.reshard, False


def _move_keys(document: Document, keys: FsdpKeys, notes: Notes, reshard: bool) -> None:
    """Rename, remove and add keys until the file says FSDP2."""
    values = document.values
    added = _additions(document, keys, reshard)
    for key in ("fsdp_version", _CONFIG):
        if key in values and values[key] in (None, {}):
            document.remove("", key)
    anchor = _CONFIG if values.get(_CONFIG) else "fsdp"
    version = values.get("fsdp_version")
    if version is None:
        document.add_above(anchor, {"fsdp_version": 2})
    elif version != 2:
        document.set_value("", "fsdp_version", 2)
    if anchor == _CONFIG:
        _move_config(document, notes, reshard)
        for key, value in added.items():
            document.add(_CONFIG, key, value)
    else:
        document.add_above(anchor, {_CONFIG: added})
    for key in ("fsdp", _STATE_DICT):
        if key in values:
            document.remove("", key)
    if values.get("fsdp"):
        notes.add("fsdp removed: the list is FSDP1's; fsdp_config says the same for FSDP2.")


def _additions(document: Document, keys: FsdpKeys, reshard: bool) -> dict[str, Any]:
    """Return what `fsdp_config` must say and does not."""
    held = {key for key, value in keys.values.items() if value is not None}
    added: dict[str, Any] = {}
    if not held & {"reshard_after_forward", "sharding_strategy"}:
        added["reshard_after_forward"] = reshard
    if keys.offload and "offload_params" not in held:
        added["offload_params"] = True
    state = document.values.get(_STATE_DICT)
    if state is not None:
        inner = keys.values.get("final_state_dict_type")
        if inner not in (None, state):
            raise AutotuneError(
                f"{document.path}: {_STATE_DICT}: {state} and fsdp_config: final_state_dict_type: "
                f"{inner} contradict each other. Keep the latter."
            )
        if inner is None:
            added["final_state_dict_type"] = state
    return added


def _move_config(document: Document, notes: Notes, reshard: bool) -> None:
    """Bring every key of `fsdp_config` under its name of FSDP2, or take it out."""
    catalogue = key_catalogue()
    given = document.values[_CONFIG]
    kept_by_optimizer = str(document.values.get("optimizer")).startswith("q_galore")
    plain = {key for key, value in given.items() if value is not None}
    for key, value in given.items():
        bare = key.removeprefix("fsdp_")
        if key in VERSION_KEYS or value is None:
            document.remove(_CONFIG, key)
        elif bare != key and bare in plain:  # of the same value, or it was refused
            document.remove(_CONFIG, key)
            notes.removed(key, f"{bare} says the same", ignored=False)
        elif bare == "sharding_strategy" and not plain & {
            "reshard_after_forward", "fsdp_reshard_after_forward"
        }:  # fmt: skip
            document.rename(_CONFIG, key, "reshard_after_forward")
            document.set_value(_CONFIG, key, reshard)
        elif bare == "use_orig_params" and kept_by_optimizer:
            _rename(document, key, bare)
        elif bare in catalogue.fsdp1_keys:
            document.remove(_CONFIG, key)
            ignored = bare not in catalogue.fsdp_keys
            notes.removed(key, catalogue.fsdp1_keys[bare], ignored=ignored)
        else:
            _rename(document, key, bare)
            if bare == "reshard_after_forward" and value is not reshard:
                document.set_value(_CONFIG, key, reshard)
            if bare.endswith("state_dict_type") and value == "LOCAL_STATE_DICT":
                document.set_value(_CONFIG, key, "SHARDED_STATE_DICT")
                notes.add(f"{key}: LOCAL_STATE_DICT, which FSDP2 does not have, is now "
                          "SHARDED_STATE_DICT.")  # fmt: skip
            if (
                bare == "cpu_ram_efficient_loading"
                and value
                and document.values.get("load_in_4bit")
            ):
                document.set_value(_CONFIG, key, False)
                notes.add(
                    f"{key} is now false: with load_in_4bit Axolotl refuses it on FSDP2. Every "
                    "rank loads the model, so host memory must hold it once a rank."
                )


def _rename(document: Document, key: str, name: str) -> None:
    if name != key:
        document.rename(_CONFIG, key, name)


def _write_sizes(document: Document, sizes: dict[str, int], notes: Notes) -> None:
    values = document.values
    differing = [f"{key}: {values[key]}" for key, size in sizes.items()
                 if values.get(key) not in (None, size)]  # fmt: skip
    if differing:
        raise AutotuneError(
            f"{document.path}: {', '.join(differing)} is not what --gpus and --nodes make "
            f"({', '.join(f'{key} {size}' for key, size in sizes.items())}). Leave one of the two."
        )
    anchor = _CONFIG if values.get(_CONFIG) else "fsdp"
    missing = {key: size for key, size in sizes.items() if values.get(key) is None}
    for key in missing.keys() & values.keys():
        document.remove("", key)
    if missing:
        document.add_above(anchor, missing)
        notes.add(
            f"{', '.join(f'{key}: {size}' for key, size in missing.items())} written: copies "
            "between nodes, shards inside one."
        )


def _change_what_fsdp2_refuses(document: Document, values: dict[str, Any], notes: Notes) -> None:
    optimizer = values.get("optimizer")
    if optimizer in _OPTIMIZERS:
        document.set_value("", "optimizer", _OPTIMIZERS[optimizer])
        notes.add(
            f"optimizer: {optimizer} is now {_OPTIMIZERS[optimizer]}: Axolotl refuses the former "
            "on FSDP2. Both keep 8-bit states; checkpoints of one are not those of the other."
        )
    if values.get(_CONFIG) and "SIZE_BASED_WRAP" in values[_CONFIG].values():
        notes.add(
            "auto_wrap_policy: SIZE_BASED_WRAP kept: Axolotl runs it on FSDP2, autotune does not "
            "(it wraps decoder layers, always)."
        )
