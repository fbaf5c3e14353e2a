"""`Sharding`: which engine shards what, read from `deepspeed:` or `fsdp_config:`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.config.keys import check_known, key_catalogue
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.plan import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The part of a plan that one engine's own configuration decides."""

    engine: Engine
    zero_stage: int = 0
    reshard_after_forward: bool = True
    offload_optimizer: bool = False
    offload_params: bool = False
    bucket_elements: int = 0
    activation_checkpointing: bool = False
    """FSDP's own switch; it asks for the same recompute as `gradient_checkpointing`."""
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def strategy_name(self, dp_replicate: int) -> str:
        """Return the name `strategies/` gives this sharding, or one built by its scheme."""
        if self.engine is Engine.DDP:
            return "ddp"
        if self.engine is Engine.DEEPSPEED:
            offload = {
                (False, False): "",
                (True, False): "_offload_optimizer",
                (True, True): "_offload_params",
                (False, True): "_offload_params_only",
            }[self.offload_optimizer, self.offload_params]
            return f"zero{self.zero_stage}{offload}"
        name = "hsdp" if dp_replicate > 1 else "fsdp2"
        reshard = "" if self.reshard_after_forward else "_no_reshard"
        return f"{name}{reshard}{'_offload' if self.offload_params else ''}"


def read_fsdp(top: Section, where: str) -> Sharding | None:
    """Read `fsdp_config`, `fsdp_version` and the FSDP1 list `fsdp`; None when there is no FSDP.

    Raises:
        AutotuneError: FSDP1, an unknown key, or a setting that is not run here.
    """
    if top.raw("fsdp"):
        raise _fsdp1_error(where, f"`fsdp: {top.raw('fsdp')}` is FSDP1")
    version = top.integer("fsdp_version")
    section = top.section("fsdp_config")
    values = _without_prefix(section.unread()) if section else {}
    if not values:
        if version is not None:
            raise AutotuneError(
                f"{where}: fsdp_version is set but fsdp_config is empty, so nothing would be "
                "sharded. Add fsdp_config (for example reshard_after_forward: true) or remove it."
            )
        return None
    _check_fsdp_keys(values, where)
    fsdp = Section(values, f"{where}: fsdp_config")
    inner = fsdp.integer("fsdp_version", fsdp.integer("version"))
    version = version if version is not None else inner
    if version is None:
        raise _fsdp1_error(where, "fsdp_version is not set, which Axolotl reads as FSDP1")
    if version != 2 or (inner or 2) != 2:
        raise _fsdp1_error(where, f"fsdp_version {version if version != 2 else inner} is given")
    fsdp.text("auto_wrap_policy", choices=("TRANSFORMER_BASED_WRAP",))
    fsdp.text("state_dict_type", choices=("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    offload = fsdp.boolean("offload_params", False)
    for key in ("transformer_layer_cls_to_wrap", "cpu_ram_efficient_loading",
                "final_state_dict_type", "cpu_offload_pin_memory"):  # fmt: skip
        fsdp.raw(key)  # The decoder layers are wrapped, weights are loaded sharded, always.
    sharding = Sharding(
        engine=Engine.FSDP2,
        reshard_after_forward=fsdp.boolean("reshard_after_forward", True),
        # CPUOffloadPolicy keeps parameters, gradients and optimizer states on the host together.
        offload_optimizer=offload,
        offload_params=offload,
        activation_checkpointing=fsdp.boolean("activation_checkpointing", False),
        warnings=_unused_fsdp(fsdp, where),
    )
    return sharding


def _unused_fsdp(fsdp: Section, where: str) -> tuple[str, ...]:
    unused = [key for key, value in fsdp.unread().items() if value is not None]
    if not unused:
        return ()
    return (f"{where}: fsdp_config: not used here: {', '.join(sorted(unused))}.",)


def _without_prefix(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key if key == "fsdp_version" else key.removeprefix("fsdp_"): value
            for key, value in values.items()}  # fmt: skip


def _check_fsdp_keys(values: Mapping[str, Any], where: str) -> None:
    catalogue = key_catalogue()
    gone = [key for key in values if key in catalogue.fsdp1_keys and key not in catalogue.fsdp_keys]
    if gone:
        successors = "; ".join(f"{key} -> {catalogue.fsdp1_keys[key]}" for key in gone)
        raise AutotuneError(f"{where}: fsdp_config carries keys of FSDP1. In FSDP2: {successors}.")
    check_known(values, catalogue.fsdp_keys, f"{where}: fsdp_config")


def _fsdp1_error(where: str, found: str) -> AutotuneError:
    return AutotuneError(
        f"{where}: {found}. FSDP1 is not run here. Write FSDP2 instead: `fsdp_version: 2` and "
        "fsdp_config with reshard_after_forward: true (was FULL_SHARD) or false (was "
        "SHARD_GRAD_OP), offload_params: false."
    )
