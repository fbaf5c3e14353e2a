"""Every number of the GPU catalogue is read out of the line its entry quotes, and compared."""

import math
import re

import pytest

from autotune.errors import AutotuneError
from autotune.spec.gpus import GpuEntry, catalogue, find_gpu, match_nvml_name
from autotune.spec.hardware import load_hardware
from autotune.units import GIB

ENTRIES = {name: GpuEntry.model_validate(entry) for name, entry in catalogue().items()}
FIGURES = [
    "memory_gib", "hbm_tb_per_s", "link_gb_per_s", "host_link_gb_per_s", "nic_gb_per_s",
    "host_memory_gib", "host_gb_per_s", "power_w",
]  # fmt: skip
# Units by what they measure. DIMMs are sold in binary GB and TB, and torch's "MB" are 2**20 bytes.
UNITS = {
    "bytes": {"MiB": 2**20, "MB": 2**20, "GiB": 2**30, "GB": 2**30, "TB": 2**40},
    "rate": {
        "GB/s": 1e9, "TB/s": 1e12, "Gb/s": 1e9 / 8, "Gbps": 1e9 / 8, "MT/s": 1e6,
    },
    "flops": {"TFLOPS": 1e12, "teraFLOPS": 1e12, "TF": 1e12, "PFLOPS": 1e15},
    "power": {"W": 1.0, "watts": 1.0, "kW": 1e3},
}  # fmt: skip
REASONS = {
    "sparsity", "directions", "GPUs", "sockets", "channels", "bytes a transfer",
    "superchips a tray", "links to the 7 others",
}  # fmt: skip
# What no document states, worked out again from the reason each entry gives.
DDR4_3200, DDR5_4800, DDR5_5600 = (8 * rate for rate in (3.2, 4.8, 5.6))  # GB/s a channel
LIKE_DGX_H100 = {"host_memory_gib": 2 * 1024, "host_gb_per_s": 2 * 8 * DDR5_4800}
LIKE_DGX_A100 = {"host_memory_gib": 1024, "host_gb_per_s": 2 * 8 * DDR4_3200}
WORKSTATION = {
    "nic_gb_per_s": 100 / 8 / 8,  # one 100 Gb/s card for 8 GPUs
    "host_memory_gib": 512,
    "host_gb_per_s": 8 * DDR4_3200,
}
ASSUMED = {
    "b200": {"host_memory_gib": 2 * 1024},
    "gb200": {
        "memory_gib": (189471 - 728) / 1024,  # nvidia-smi's MiB less what torch does not see
        "nic_gb_per_s": 400 / 8,
    },
    "mi300x": {"nic_gb_per_s": 400 / 8, **LIKE_DGX_H100},
    "h100-pcie": {"nic_gb_per_s": 400 / 8 / 2, **LIKE_DGX_H100},  # one card for two GPUs
    "h100-nvl": {"nic_gb_per_s": 400 / 8 / 2, **LIKE_DGX_H100},
    "a100-80gb-pcie": {"nic_gb_per_s": 200 / 8 / 2, **LIKE_DGX_A100},
    "a100-40gb-pcie": {"nic_gb_per_s": 200 / 8 / 2, **LIKE_DGX_A100},
    "l40s": {"host_gb_per_s": 2 * 8 * DDR4_3200},
    "l4": {"host_gb_per_s": 2 * 8 * DDR4_3200},
    "a10g": {"host_gb_per_s": 2 * 8 * DDR4_3200},
    "t4": {"host_gb_per_s": 2 * 6 * 8 * 2.933},  # two sockets of 6 channels of DDR4-2933
    "rtx-3090": WORKSTATION,
    "rtx-4090": WORKSTATION,
    "rtx-5090": WORKSTATION,
    "rtx-6000-ada": WORKSTATION,
    # Both cards show 97887 MiB; torch states 94.97 GiB of the Server Edition's.
    "rtx-pro-6000": {**WORKSTATION, "memory_gib": 94.97},
    "rtx-pro-6000-server": {
        "tflops.bf16": 1000 / 2,  # 1 PFLOP with sparsity
        "tflops.fp16": 1000 / 2,
        "host_gb_per_s": 2 * 8 * DDR5_5600,
    },
}
# Rate of the tensor cores, accumulating in fp32, over that of the CUDA cores: a GeForce's is half
# a workstation card's. For entries that have no other rate to be compared with.
TENSOR_OVER_CUDA = {
    "a10g": 2, "rtx-3090": 2, "t4": 8, "rtx-pro-6000": 4, "rtx-pro-6000-server": 4,
}  # fmt: skip


def dimension(figure):
    if figure.startswith("tflops."):
        return "flops", 1e12
    if figure == "power_w":
        return "power", 1.0
    if figure.endswith("_gib"):
        return "bytes", float(GIB)
    return "rate", 1e12 if "_tb_" in figure else 1e9


def read_quote(quote, kind):
    """Return the quoted figure in base units: the first with a fitting unit right behind it, else
    the first of the cell in the unit of its row's label ("... TFLOPS: 165.2/330.4"). A memory
    line's is its last: the device's name may hold its nominal size."""
    units = "|".join(sorted(map(re.escape, UNITS[kind]), key=len, reverse=True))
    number = r"(?<![A-Za-z\d.,])(\d[\d,]*(?:\.\d+)?)"
    pattern = rf"{number}\s*({units})(?![A-Za-z/])"
    found = list(re.finditer(pattern, quote.replace("/sec", "/s")))
    if not found:
        label, _, cell = quote.rpartition(": ")
        first, unit = re.search(number, cell), re.search(rf"\b({units})\b", label)
        assert first and unit, f"{quote!r} holds no figure with a unit of {kind}"
        return float(first[1].replace(",", "")) * UNITS[kind][unit[1]]
    figure = found[-1 if kind == "bytes" else 0]
    return float(figure[1].replace(",", "")) * UNITS[kind][figure[2]]


def stated(entry, figure):
    """Return what the entry says, and what its quoted line comes to."""
    head, _, dtype = figure.partition(".")
    own = entry.tflops[dtype] if dtype else getattr(entry, head)
    source = entry.sources[figure]
    kind, unit = dimension(figure)
    read = read_quote(source.quote, kind) / unit
    read *= math.prod(source.multiply_by.values()) / math.prod(source.divide_by.values())
    return own, read


def figures_of(entry):
    return [*FIGURES, *(f"tflops.{dtype}" for dtype in entry.tflops)]


@pytest.mark.parametrize(
    ("name", "figure"),
    [(name, figure) for name, entry in ENTRIES.items() for figure in figures_of(entry)],
)
def test_every_figure_is_in_its_quoted_line(name, figure):
    entry = ENTRIES[name]
    assert (figure in entry.sources) != (figure in entry.assumed), "one source or one reason"
    if figure in entry.assumed:
        assert len(entry.assumed[figure]) > 10
        return
    source = entry.sources[figure]
    assert source.document and not re.search(r"https?:", source.document)
    assert set(source.divide_by) | set(source.multiply_by) <= REASONS
    for reason in ("sparsity", "directions"):
        assert source.divide_by.get(reason, 2) == 2
    own, read = stated(entry, figure)
    assert own == pytest.approx(read, rel=2e-3), source.quote  # rounded like the data sheets


def test_nothing_else_is_sourced_or_assumed():
    for entry in ENTRIES.values():
        assert set(entry.sources) | set(entry.assumed) == set(figures_of(entry))


@pytest.mark.parametrize(
    ("figure", "change"),
    [
        ("hbm_tb_per_s", {"hbm_tb_per_s": 3.9}),
        ("tflops.fp8", {"tflops": {"fp8": 3957.8}}),  # the sparse rate
        ("link_gb_per_s", {"link_gb_per_s": 900}),  # both directions
        ("memory_gib", {"memory_gib": 80}),  # the nominal size
    ],
)
def test_a_wrong_figure_would_be_found(figure, change):
    own, read = stated(ENTRIES["h100-sxm"].model_copy(update=change), figure)
    assert own != pytest.approx(read, rel=2e-3)


def test_accumulation_in_fp32_halves_geforce_and_not_the_workstation_card():
    assert ENTRIES["rtx-4090"].tflops["bf16"] == pytest.approx(330.3 / 2, rel=1e-3)
    assert ENTRIES["rtx-6000-ada"].tflops["bf16"] > 2 * ENTRIES["rtx-4090"].tflops["bf16"]


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_makes_hardware(name):
    hardware = load_hardware(name, 8)
    gpu, entry = hardware.gpu, ENTRIES[name]
    assert hardware.num_gpus == 8
    assert gpu.source and gpu.memory_bytes > 14 * GIB and gpu.power_w == entry.power_w
    assert gpu.peak_flops["fp32"] > 1e12
    assert gpu.peak_flops.get("bf16", math.inf) > gpu.peak_flops["fp32"]
    # Order of the hierarchy: memory over the link over the bus over the network card's share.
    assert gpu.hbm_bytes_per_s > hardware.intra_node.bytes_per_s >= gpu.host_link.bytes_per_s
    assert gpu.host_link.bytes_per_s > entry.nic_gb_per_s * 1e9


@pytest.mark.parametrize("name", ENTRIES)
def test_hardware_has_the_entrys_figures_in_base_units(name):
    entry = ENTRIES[name]
    nodes = (entry.link_domain_gpus or 0) // entry.gpus_per_node + 2  # past what the link reaches
    hardware = load_hardware(name, nodes * entry.gpus_per_node)
    gpu = hardware.gpu
    assert gpu.memory_bytes == int(entry.memory_gib * 2**30)
    assert gpu.hbm_bytes_per_s == entry.hbm_tb_per_s * 1e12
    rates = {dtype: entry.tflops[dtype] * 1e12 for dtype in {"bf16", "fp32"} & entry.tflops.keys()}
    assert gpu.peak_flops == rates
    assert hardware.intra_node.bytes_per_s == entry.link_gb_per_s * 1e9
    assert hardware.inter_node.bytes_per_s == entry.nic_gb_per_s * 1e9
    assert gpu.host_link.bytes_per_s == entry.host_link_gb_per_s * 1e9
    assert hardware.host_memory_bytes == int(entry.host_memory_gib * 2**30)
    assert hardware.host_bytes_per_s == entry.host_gb_per_s * 1e9


@pytest.mark.parametrize("name", ENTRIES)
def test_rates_stand_to_each_other_as_their_formats_do(name):
    """A sparse rate read as a dense one is twice what the others come to, whatever is quoted."""
    rates = ENTRIES[name].tflops
    half = rates["fp16"]
    expected = {"bf16": half, "fp8": 2 * half, "tf32": half / 2}
    if not {"fp8", "tf32"} & rates.keys():
        expected["fp32"] = half / TENSOR_OVER_CUDA[name]
    for dtype in expected.keys() & rates.keys():
        assert rates[dtype] == pytest.approx(
            expected[dtype], rel=0.015 if dtype != "fp32" else 0.05
        )


@pytest.mark.parametrize("name", ENTRIES)
def test_assumed_figures_are_what_their_reasons_come_to(name):
    entry, expected = ENTRIES[name], ASSUMED.get(name, {})
    assert entry.assumed.keys() == expected.keys()
    for figure, value in expected.items():
        head, _, dtype = figure.partition(".")
        own = entry.tflops[dtype] if dtype else getattr(entry, head)
        assert own == pytest.approx(value, rel=3e-3), figure  # cut to whole GB/s


def test_a_gb200_node_is_a_tray_and_its_link_the_racks():
    small, rack, racks = (load_hardware("gb200", count) for count in (4, 72, 76))
    assert (small.num_nodes, rack.num_nodes, rack.gpus_per_node) == (1, 18, 4)
    assert rack.inter_node == rack.intra_node
    assert racks.inter_node.bytes_per_s == 50e9
    with pytest.raises(AutotuneError, match=r"whole number of nodes of 4\. Nearest: 4 or 8"):
        load_hardware("gb200", 6)


def test_aliases_are_unique_and_found():
    names = [n for key, entry in ENTRIES.items() for n in (key, *entry.aliases)]
    assert len(names) == len(set(names)) and all(name == name.lower() for name in names)
    assert find_gpu("H200")[0] == "h200-sxm" and find_gpu("4090")[0] == "rtx-4090"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"), ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"), ("Tesla T4", "t4"), ("NVIDIA T4", "t4"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("GeForce RTX 3090", "rtx-3090"), ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        # Slices, other cards of the family, other memories: nobody's by accident.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H200 NVL", None), ("NVIDIA H100 64GB HBM2", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None), ("NVIDIA A10", None), ("NVIDIA L40", None), ("Tesla T40", None),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GB300", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None), ("NVIDIA", None),
        ("", None), ("AMD Instinct MI300X", None),
    ],
)  # fmt: skip
def test_nvml_names(device, name):
    assert match_nvml_name(device) == name
