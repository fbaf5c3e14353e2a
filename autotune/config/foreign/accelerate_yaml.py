"""An accelerate config file (`accelerate launch --config_file`) as Axolotl's keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.config.foreign.deepspeed_json import (
    mapping_of_fields,
    refuse_fields_beside_file,
    translate_deepspeed,
)
from autotune.config.foreign.fsdp_fields import translate_fsdp
from autotune.config.foreign.translated import Translated
from autotune.config.keys import check_known
from autotune.config.presets import find_deepspeed
from autotune.config.values import Section
from autotune.errors import AutotuneError

# The fields of accelerate's `ClusterConfig` (1.15): it refuses any other key, and so does this.
_WHERE_IT_RUNS = frozenset({
    "compute_environment", "debug", "machine_rank", "gpu_ids", "main_process_ip",
    "main_process_port", "rdzv_backend", "same_network", "main_training_function",
    "enable_cpu_affinity", "mpirun_config", "tpu_name", "tpu_zone", "tpu_use_cluster",
    "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", "downcast_bf16",
})  # fmt: skip
"""They place processes and change nothing that is estimated."""
_KNOWN = _WHERE_IT_RUNS | {
    "distributed_type", "mixed_precision", "use_cpu", "num_processes", "num_machines", "fp8_config",
    "deepspeed_config", "fsdp_config", "parallelism_config", "megatron_lm_config", "dynamo_config",
    "fp16", "dynamo_backend",
}  # fmt: skip
_CHANGE_NOTHING = frozenset({
    "deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter", "zero3_init_flag", "zero3_save_16bit_model",
})  # fmt: skip
"""Of `deepspeed_config`: how ranks are started, weights loaded and saved."""
_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")
_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
_HANDLERS = ("cp_backend", "cp_comm_strategy", "sp_backend", "sp_seq_length",
             "sp_seq_length_is_variable", "sp_attn_implementation")  # fmt: skip
_PREFIX = "parallelism_config_"


def translate_accelerate(
    values: Mapping[str, Any], folder: Path, where: str, *, hidden_size: int, num_gpus: int | None
) -> Translated:
    """Translate the mapping of an accelerate config file.

    It says how ranks and states are laid out, not what is trained: micro batch and sequence length
    are the script's there, and are not in the result unless a DeepSpeed file states them.

    Args:
        values: The mapping.
        folder: Where the file lies: a DeepSpeed file may lie beside it.
        where: What to call it in messages.
        hidden_size: Of the model.
        num_gpus: Ranks asked for; None takes `num_processes`.

    Raises:
        AutotuneError: an unknown key, or a setting without a counterpart here.
    """
    check_known(values, _KNOWN, where)
    top = Section(values, where)
    for key in _WHERE_IT_RUNS:
        top.raw(key)
    if top.raw("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise top.error("compute_environment", "Allowed: LOCAL_MACHINE.")
    kind = top.text("distributed_type", choices=_TYPES)
    if kind is None:
        raise AutotuneError(f"{where}: distributed_type is missing. Allowed: {', '.join(_TYPES)}.")
    sizes = _sizes(top)
    found = _engine(top, kind, folder, sizes, hidden_size=hidden_size, num_gpus=num_gpus)
    stated = 1 if kind == "NO" else _processes(top)
    if stated is not None or num_gpus is not None:
        found.set_ranks(where, stated, num_gpus)
    if top.boolean("use_cpu", False):
        found.device = "cpu"
    _mesh(found, kind, sizes)
    _precision(found, top)
    _compiling(found, top)
    unused = [key for key, value in top.unread().items() if value]
    found.warn_unused(where, unused, "nothing here does it")
    return found


def _processes(top: Section) -> int | None:
    machines = top.integer("num_machines", 1)
    given = top.raw("num_processes")
    if given is None or given == -1:
        return None
    count = top.integer("num_processes", minimum=1)
    if count is not None and count % max(machines, 1):
        raise top.error("num_processes", f"It counts all ranks of {machines} machines.")
    return count


def _sizes(top: Section) -> dict[str, int]:
    section = top.section("parallelism_config")
    if section is None:
        return {}
    bare = {key.removeprefix(_PREFIX): value for key, value in section.unread().items()}
    check_known(bare, (*_SIZES, *_HANDLERS), section.where)
    plain = Section(bare, section.where)
    sizes = {name: plain.integer(name, 1, minimum=1) for name in _SIZES if plain.has(name)}
    if sizes.get("cp_size", 1) > 1 and sizes.get("sp_size", 1) > 1:
        raise plain.error("sp_size", "cp_size and sp_size exclude each other in accelerate.")
    return sizes


def _engine(
    top: Section,
    kind: str,
    folder: Path,
    sizes: Mapping[str, int],
    *,
    hidden_size: int,
    num_gpus: int | None,
) -> Translated:
    fsdp, deepspeed = top.section("fsdp_config"), top.section("deepspeed_config")
    if kind == "FSDP":
        return translate_fsdp(fsdp or Section({}, f"{top.where}: fsdp_config"),
                              top.integer("num_machines", 1))  # fmt: skip
    if kind != "DEEPSPEED":
        return Translated()
    fields = deepspeed or Section({}, f"{top.where}: deepspeed_config")
    file = fields.text("deepspeed_config_file")
    if file is not None:
        refuse_fields_beside_file(fields)
        if top.has("mixed_precision"):
            raise top.error("mixed_precision", "accelerate refuses it beside "
                            "deepspeed_config_file: say it there.")  # fmt: skip
        mapping, label = find_deepspeed(file, folder, fields.where)
    else:
        mapping, label = mapping_of_fields(fields), fields.where
        # As its `DeepSpeedPlugin.set_mixed_precision`: what is not in float8 is in bf16.
        mapping["bf16"] = {"enabled": top.raw("mixed_precision") in ("bf16", "fp8")}
    cp = max(sizes.get("sp_size", 1), sizes.get("cp_size", 1))
    asked = num_gpus if num_gpus is not None else _processes(top)
    found = translate_deepspeed(
        mapping, label, hidden_size=hidden_size, num_gpus=asked, accelerate_cp=cp
    )
    unused = [key for key, value in fields.unread().items()
              if value and key not in _CHANGE_NOTHING]  # fmt: skip
    found.warn_unused(fields.where, unused, "nothing here does it")
    return found


def _mesh(found: Translated, kind: str, sizes: Mapping[str, int]) -> None:
    if kind in ("FSDP", "MULTI_GPU", "MULTI_CPU"):
        # DeepSpeed shards over all ranks, whatever these two say.
        for name in ("dp_replicate_size", "dp_shard_size"):
            if name in sizes and (kind == "FSDP" or sizes[name] > 1):
                found.keys[name] = sizes[name]
    if sizes.get("tp_size", 1) > 1:
        found.keys["tensor_parallel_size"] = sizes["tp_size"]
    cp = max(sizes.get("sp_size", 1), sizes.get("cp_size", 1))
    if cp > 1:
        found.keys["context_parallel_size"] = cp
    if sizes.get("cp_size", 1) > 1:
        found.warnings.append(
            "cp_size is torch's context parallelism in accelerate; it is read as Ulysses. With "
            "--sequence-parallel-by ring it is read as ring attention."
        )


def _precision(found: Translated, top: Section) -> None:
    given = top.raw("mixed_precision")
    if top.raw("fp16"):
        given = "fp16"
    if given is False:  # YAML reads an unquoted no so
        given = "no"
    if given == "fp8":
        _float8(found, top.section("fp8_config") or Section({}, f"{top.where}: fp8_config"))
        given = "bf16"  # accelerate's type of everything that is not in float8
    if given not in (None, "no", "bf16"):
        raise top.error("mixed_precision", "Allowed: bf16, fp8, no.")
    if "bf16" not in found.keys:
        found.keys["bf16"] = given == "bf16"


def _float8(found: Translated, section: Section) -> None:
    backend = section.text("backend", "AO").upper()
    if backend not in ("AO", "TORCHAO"):
        raise section.error("backend", "Allowed: AO; the others are not run here.")
    found.keys["fp8"] = True
    if section.boolean("enable_fsdp_float8_all_gather", False):
        found.keys["fp8_enable_fsdp_float8_all_gather"] = True
    if section.boolean("pad_inner_dim", False):
        found.warn_unused(section.where, ["pad_inner_dim"], "sizes are multiples of 16 here")


def _compiling(found: Translated, top: Section) -> None:
    section = top.section("dynamo_config")
    backend = top.raw("dynamo_backend", "NO")
    if section is not None:
        bare = {key.removeprefix("dynamo_"): value for key, value in section.unread().items()}
        backend = bare.pop("backend", backend)
        changing = {"mode": "default", "use_fullgraph": False, "use_dynamic": False}
        unused = [f"dynamo_{key}" for key, value in bare.items()
                  if value not in (None, changing.get(key, None))]  # fmt: skip
        found.warn_unused(section.where, unused, "torch.compile runs with its defaults")
    backend = str(backend).upper()
    if backend == "INDUCTOR":
        found.keys["torch_compile"] = True
    elif backend not in ("NO", "NONE", "FALSE"):
        found.warn_unused(top.where, ["dynamo_backend"], f"{backend}; inductor alone is run")
