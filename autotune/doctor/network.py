"""Checks of what joins ranks: NCCL's version and variables, interfaces, InfiniBand."""

from __future__ import annotations

from importlib.metadata import distributions

from autotune.doctor.finding import Finding, Machine, broken, note, ok, warning

_SLOWS = {
    "NCCL_P2P_DISABLE": "GPUs talk through host memory",
    "NCCL_SHM_DISABLE": "GPUs without peer access talk through the network stack",
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the last; times mean nothing",
    "NCCL_BLOCKING_WAIT": "every collective blocks the host",
    "TORCH_NCCL_BLOCKING_WAIT": "every collective blocks the host",
}
_STEERS = (
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_LEVEL", "NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_BUFFSIZE",
    "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG",
    "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "TORCH_NCCL_AVOID_RECORD_STREAMS", "NCCL_TIMEOUT",
    "AXOLOTL_NCCL_TIMEOUT", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS",
)  # fmt: skip
_LEFT_OVER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SWITCHES = ("ACCELERATE_USE_", "FSDP_", "ACCELERATE_DEEPSPEED_", "PARALLELISM_CONFIG_")


def check_variables(machine: Machine, *, infiniband: bool) -> list[Finding]:
    """Look for variables that steer collectives, or that an earlier launch left behind."""
    given = machine.variables
    found = [
        warning("nccl_env", f"{name}={given[name]}: {effect}", f"unset {name}, unless a hang needs "
                "it: autotune doctor says which pairs hang without.")
        for name, effect in _SLOWS.items() if _is_on(given.get(name))
    ]  # fmt: skip
    if infiniband and _is_on(given.get("NCCL_IB_DISABLE")):
        found.append(
            warning("nccl_env", "NCCL_IB_DISABLE=1 with InfiniBand adapters here: hosts talk over "
                    "TCP", "unset NCCL_IB_DISABLE.")
        )  # fmt: skip
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        found += _interface(machine, name)
    left = [name for name in _LEFT_OVER if name in given]
    if left:
        found.append(
            note("launch_env", f"{', '.join(left)} set outside a launch",
                 f"unset {' '.join(left)}: a program started alone would wait for other ranks.")
        )  # fmt: skip
    switches = sorted(name for name in given if name.startswith(_SWITCHES))
    if switches:
        found.append(
            warning("accelerate_env", f"{', '.join(switches)} set: accelerate takes them over what "
                    "a file says", f"unset {' '.join(switches)}.")
        )  # fmt: skip
    steering = [f"{name}={given[name]}" for name in _STEERS if name in given]
    if steering:
        found.append(note("nccl_env", f"in force: {', '.join(steering)}"))
    return found or [ok("nccl_env", "no variable of NCCL or accelerate is set")]


def _interface(machine: Machine, name: str) -> list[Finding]:
    """Hold the interfaces a variable names against those there are; NCCL's own rules of reading."""
    value = machine.variables.get(name)
    if not value:
        return []
    there = machine.names("sys/class/net")
    excludes, exact = value.startswith("^"), "=" in value[:2]
    wanted = [word for word in value.lstrip("^=").split(",") if word]
    # NCCL takes prefixes, "=" makes them exact, "^" means all but these; gloo takes exact names.
    whole = exact or name.startswith("GLOO")
    matching = [
        each for each in there
        if any(each == word if whole else each.startswith(word) for word in wanted) != excludes
    ]  # fmt: skip
    if matching:
        return [note("interfaces", f"{name}={value} chooses {', '.join(matching)}")]
    return [
        broken("interfaces", f"{name}={value} matches no interface",
               f"Set it to one of {', '.join(there) or '(none)'}, or unset it.")
    ]  # fmt: skip


def infiniband_adapters(machine: Machine) -> list[str]:
    """Return the names of the adapters under /sys/class/infiniband."""
    return machine.names("sys/class/infiniband")


def check_infiniband(machine: Machine, *, nodes: int) -> list[Finding]:
    """Look at every port of every adapter."""
    adapters = infiniband_adapters(machine)
    if not adapters:
        if nodes == 1:
            return [ok("infiniband", "none; one host needs none")]
        return [
            warning("infiniband", f"no adapter; {nodes} hosts talk over TCP",
                    "Set NCCL_SOCKET_IFNAME to the fastest interface. Sharding inside a host "
                    "(hsdp) sends least between hosts.")
        ]  # fmt: skip
    found = []
    for adapter in adapters:
        for port in machine.names(f"sys/class/infiniband/{adapter}/ports"):
            folder = f"sys/class/infiniband/{adapter}/ports/{port}"
            state = machine.read(f"{folder}/state") or "state unknown"
            layer = machine.read(f"{folder}/link_layer") or "layer unknown"
            rate = machine.read(f"{folder}/rate") or "rate unknown"
            seen = f"{adapter} port {port}: {state}, {layer}, {rate}"
            if "ACTIVE" in state:
                found.append(ok("infiniband", seen))
            else:
                found.append(
                    warning("infiniband", seen, "Ask the administrator, or leave it out: "
                            f"NCCL_IB_HCA=^{adapter} (all of them: NCCL_IB_DISABLE=1).")
                )  # fmt: skip
    return found or [warning("infiniband", f"{', '.join(adapters)}: no port",
                             "Without one set NCCL_IB_DISABLE=1.")]  # fmt: skip


def nccl_packages() -> dict[str, str]:
    """Return the installed NCCL packages and their versions."""
    named = ((str(d.metadata["Name"]).lower(), d.version) for d in distributions())
    return {name: version for name, version in named if name.startswith("nvidia-nccl")}


def check_nccl(packages: dict[str, str], *, gpus: int) -> list[Finding]:
    """Say which NCCL is installed; two of them overwrite each other's files."""
    listed = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
    if len(packages) > 1:
        return [
            warning("nccl", f"several: {listed}, in the same folder",
                    "pip uninstall all of them, then install torch again: it brings its own.")
        ]  # fmt: skip
    if not packages:
        level = note if gpus else ok
        return [level("nccl", "no NCCL package; CPU ranks use gloo" if not gpus else
                      "no NCCL package: torch brings its own or the system's is used")]  # fmt: skip
    return [ok("nccl", listed)]


def _is_on(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in ("", "0", "false", "no", "off")
