"""`GpuEntry`: what is known of one GPU and its usual node, from the catalogue or a user's YAML."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotune.errors import AutotuneError, nearest
from autotune.spec.catalogue import read_catalogue

CPU = "cpu"
GPUS_PER_NODE = 8
_FILES = ("gpus", "gpus_pcie", "gpus_rtx")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dtype = Literal["bf16", "fp16", "tf32", "fp32", "fp8"]


class Source(BaseModel):
    """The line a figure stands in, and what lies between the figure there and ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    document: str
    quote: str
    divide_by: dict[str, Positive] = {}
    """Such as ``sparsity: 2``: the quoted rate holds for sparse matrices."""
    multiply_by: dict[str, Positive] = {}


class GpuEntry(BaseModel):
    """One GPU and the node it usually sits in; docs/capacity.md explains each field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: tuple[str, ...] = ()
    nvml_names: tuple[str, ...] = ()
    """As NVML and nvidia-smi name it, without ``NVIDIA``; compared whole."""
    memory_gib: Positive
    """What CUDA offers a process, below the nominal size."""
    hbm_tb_per_s: Positive
    tflops: dict[Dtype, Positive]
    """Dense rates of matrix products that accumulate in fp32."""
    link: Literal["nvlink", "infinity-fabric", "pcie"]
    link_gb_per_s: Positive
    """One direction of one GPU to the others of its node."""
    host_link_gb_per_s: Positive
    """One direction between one GPU and its host's memory."""
    nic_gb_per_s: Positive
    """One direction of one GPU's share of the node's network cards."""
    host_memory_gib: Positive
    """Of a whole node."""
    host_gb_per_s: Positive
    """Memory bandwidth of a node's CPUs, all sockets."""
    power_w: Positive
    """What the board may draw in the long run (TDP)."""
    gpus_per_node: int = Field(default=GPUS_PER_NODE, ge=1)
    link_domain_gpus: int | None = Field(default=None, ge=1)
    """GPUs `link` reaches when that is more than one node; None: one node."""
    note: str = ""
    sources: dict[str, Source] = {}
    assumed: dict[str, str] = {}
    """Figure and reason, for figures no document states."""

    @property
    def provenance(self) -> str:
        """Return the documents and the assumptions in one line."""
        documents = dict.fromkeys(source.document for source in self.sources.values())
        assumed = f"assumed: {', '.join(self.assumed)}" if self.assumed else ""
        return "; ".join(filter(None, [*documents, assumed, self.note]))


def gpu_types() -> list[str]:
    """Return the names `find_gpu` knows, aliases left out, `cpu` at the end."""
    return [*catalogue(), CPU]


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Return every entry of the catalogue as it is written."""
    return {name: entry for file in _FILES for name, entry in read_catalogue(file).items()}


def find_gpu(gpu_type: str) -> tuple[str, GpuEntry]:
    """Return the name and the entry of a catalogue name, an alias, or a YAML file.

    Raises:
        AutotuneError: an unknown name, or a file that is missing or is no GPU.
    """
    if gpu_type.endswith((".yaml", ".yml")) or "/" in gpu_type:
        path = Path(gpu_type)
        if path.stem.lower() == CPU:
            raise AutotuneError(f"{path}: its name is what CPU ranks are called. Rename the file.")
        return path.stem, read_gpu_file(path)
    known = catalogue()
    names = {alias: key for key, e in known.items() for alias in (key, *e.get("aliases", ()))}
    wanted = gpu_type.lower()
    if wanted not in names:
        raise AutotuneError(
            f"Unknown GPU type {gpu_type!r}.{nearest(gpu_type, [*names, CPU])} Known: "
            f"{', '.join(gpu_types())}; or a YAML file of your own, such as ./mygpu.yaml."
        )
    return names[wanted], GpuEntry.model_validate(known[names[wanted]])


def match_nvml_name(device_name: str) -> str | None:
    """Return the catalogue name of a device as NVML names it.

    Names are compared whole: ``NVIDIA A100-SXM4-40GB MIG 1g.5gb``, a slice of a GPU, is not the
    GPU, and ``NVIDIA H100 NVL`` is not an H100 SXM.
    """
    bare = device_name.removeprefix("NVIDIA ")
    return next((k for k, e in catalogue().items() if bare in e.get("nvml_names", ())), None)


def read_gpu_file(path: Path) -> GpuEntry:
    """Read a user's own GPU: the fields of one catalogue entry at the top of a YAML file.

    Raises:
        AutotuneError: no such file, no YAML, or an unknown, missing or impossible field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise AutotuneError(
            f"GPU file {path} cannot be read: {reason}. Give a YAML file, or one of: "
            f"{', '.join(gpu_types())}."
        ) from error
    try:
        values = yaml.load(text, Loader=_LOADER)
        root = yaml.compose(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date that does not exist
        raise AutotuneError(
            f"GPU file {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise AutotuneError(
            f"GPU file {path} must hold the fields of one GPU ({', '.join(_required())}), "
            f"not {type(values).__name__}."
        )
    try:
        return GpuEntry.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(dict(problem), root) for problem in error.errors())
        raise AutotuneError(f"GPU file {path}: {problems}.") from None


def _required() -> list[str]:
    return [name for name, field in GpuEntry.model_fields.items() if field.is_required()]


def _explain(problem: dict[str, Any], root: yaml.Node | None) -> str:
    """Say what is wrong with one field, where, and what is near or allowed."""
    where = [part for part in problem["loc"] if part != "[key]"]
    name = ".".join(map(str, where))
    if problem["type"] == "missing":
        return f"{name} is missing; every GPU needs {', '.join(_required())}"
    place = f"line {_line(root, where)}: "
    if problem["type"] == "extra_forbidden" and len(where) == 1:
        known = list(GpuEntry.model_fields)
        return f"{place}unknown key {name!r}.{nearest(name, known)} Known: {', '.join(known)}"
    return f"{place}{name}: {problem['msg']} (given: {problem['input']!r})"


def _line(node: yaml.Node | None, where: list[Any]) -> int:
    """Return the line of the innermost key of `where` that the file holds, counted from 1."""
    line = node.start_mark.line if node else 0
    for part in where:
        if not isinstance(node, yaml.MappingNode):
            break
        found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1
