"""Keys that choose kernels and losses: Liger, chunked and cut cross-entropy, offloading, fp8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.config.keys import USE_LIGER
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.spec.workload import LigerKernel, Workload

LIGER_PLUGIN = "axolotl.integrations.liger.LigerPlugin"
CUT_PLUGIN = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
_LIGER_KEYS = {f"liger_{kernel}": kernel for kernel in LigerKernel}
_NOT_RUN = ("liger_cross_entropy", "liger_layer_norm", "liger_rms_norm_gated",
            "liger_use_token_scaling")  # fmt: skip
_FLOAT8_GATHER = "fp8_enable_fsdp_float8_all_gather"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What a file asks for besides the model's own code."""

    liger: tuple[LigerKernel, ...] = ()
    chunked_loss: bool = False
    activation_offloading: bool = False
    fp8: bool = False
    fp8_all_gather: bool = False
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Keys that choose what is not run here: plugins, and whether cut cross-entropy is on."""
    warning: str | None = None
    """What is accepted, but runs otherwise."""

    @property
    def explained(self) -> set[str]:
        """Keys that `warning` says enough about."""
        return {"plugins"} if set(self.kept.get("plugins", ())) <= {CUT_PLUGIN} else set()


def read_kernels(top: Section, where: str) -> Kernels:
    """Read the keys; which of them run on a device is decided by `autotune.rules`.

    Without Liger's plugin its keys stay unread, because Axolotl passes over them as well.

    Raises:
        AutotuneError: several losses at once, a kernel that is not run here, or a value of the
            wrong kind.
    """
    plugins = _read_plugins(top)
    liger = _read_liger(top, LIGER_PLUGIN in plugins)
    chunked = top.boolean("chunked_cross_entropy", False)
    cut = CUT_PLUGIN in plugins and top.boolean("cut_cross_entropy", True)
    fused = LigerKernel.FUSED_LINEAR_CROSS_ENTROPY in liger
    losses = {"chunked_cross_entropy": chunked, "cut_cross_entropy": cut,
              "liger_fused_linear_cross_entropy": fused}  # fmt: skip
    chosen = [name for name, asked in losses.items() if asked]
    if len(chosen) > 1:
        raise AutotuneError(f"{where}: {' and '.join(chosen)} exclude each other. Keep one.")
    kept: dict[str, Any] = {}
    if others := [name for name in plugins if name != LIGER_PLUGIN]:
        kept["plugins"] = others
    if CUT_PLUGIN in others and not cut:
        kept["cut_cross_entropy"] = False
    return Kernels(
        liger=liger,
        chunked_loss=chunked or cut,
        activation_offloading=_read_offloading(top),
        fp8=_read_fp8(top),
        fp8_all_gather=top.boolean(_FLOAT8_GATHER, False),
        kept=kept,
        warning=f"{where}: {_CUT_RUNS_CHUNKED}" if cut else None,
    )


_CUT_RUNS_CHUNKED = (
    "cut_cross_entropy is Axolotl's own fork and not run here: the loss runs as "
    "chunked_cross_entropy, the same value in less memory than the plain one."
)


def kernel_keys(workload: Workload) -> dict[str, Any]:
    """Return the keys that `read_kernels` reads back, under Axolotl's names."""
    keys: dict[str, Any] = {}
    if workload.liger:
        keys["plugins"] = [LIGER_PLUGIN]
        keys |= {f"liger_{kernel}": True for kernel in workload.liger}
    if workload.chunked_loss:
        keys["chunked_cross_entropy"] = True
    if workload.activation_offloading:
        keys["activation_offloading"] = True
    if workload.fp8:
        keys["fp8"] = True
    if workload.fp8_all_gather:
        keys[_FLOAT8_GATHER] = True
    return keys


def with_kept(keys: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys of a file that are kept but not run here; both may list plugins."""
    merged = dict(keys) | dict(kept)
    if plugins := [*keys.get("plugins", ()), *kept.get("plugins", ())]:
        merged["plugins"] = plugins
    if CUT_PLUGIN in plugins and kept.get("cut_cross_entropy", True):
        merged.pop("chunked_cross_entropy", None)  # what runs here in its place
    return merged


def _read_plugins(top: Section) -> list[str]:
    plugins = top.raw("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise top.error("plugins", "Write a list of plugins' dotted names.")
    return plugins


def _read_liger(top: Section, listed: bool) -> tuple[LigerKernel, ...]:
    everything = top.boolean(USE_LIGER, False)
    if not listed and not everything:
        return ()
    for key in _NOT_RUN:
        if top.boolean(key, False):
            raise top.error(key, f"Kernels that run here: {', '.join(_LIGER_KEYS)}.")
    asked = [kernel for key, kernel in _LIGER_KEYS.items() if top.boolean(key, False)]
    return tuple(LigerKernel) if everything else tuple(asked)


def _read_offloading(top: Section) -> bool:
    given = top.raw("activation_offloading")
    if given not in (None, True, False):
        raise top.error("activation_offloading", "Write true or false: what recomputation keeps "
                        "goes to host memory; to a disk it does not go here.")  # fmt: skip
    return bool(given)


def _read_fp8(top: Section) -> bool:
    """Read `fp8`, and its recipe as Axolotl 0.19 writes one."""
    if config := top.section("fp8_config"):
        config.text("recipe", choices=("tensorwise",))
    return top.boolean("fp8", False)
