"""The memory of one configuration as tables: where it goes, when, and what would free most."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from autotune.cli.tables import VERDICT_STYLES, error_words
from autotune.memory import MemoryEstimate
from autotune.memory.advice import Advice
from autotune.planner import Estimate
from autotune.spec.hardware import HardwareSpec
from autotune.units import GIB, format_bytes

_MOST_ADVICE = 8
_SIDE_BY_SIDE = 100
"""Columns from which two tables stand beside each other."""


def print_memory(
    console: Console, estimate: Estimate, hardware: HardwareSpec, advice: Sequence[Advice]
) -> None:
    """Print the verdict, the breakdown by component and by instant, and the advice."""
    memory = estimate.memory
    for line in verdict_lines(estimate, hardware):
        console.print(line, highlight=False)
    components, instants = components_table(memory), instants_table(memory)
    if console.width >= _SIDE_BY_SIDE:
        both = Table.grid(padding=(0, 4))
        both.add_row(components, instants)
        console.print(both)
    else:
        console.print(components)
        console.print(instants)
    if advice:
        console.print(advice_table(advice[:_MOST_ADVICE], wide=console.width >= _SIDE_BY_SIDE))
    else:
        console.print("No single legal change would lower the peak.", highlight=False)


def verdict_lines(estimate: Estimate, hardware: HardwareSpec) -> list[str]:
    """Return whether it fits, with what certainty, and what that rests on."""
    memory = estimate.memory
    low, high = memory.interval_bytes
    style = VERDICT_STYLES[estimate.verdict]
    word = str(estimate.verdict).replace("_", " ").upper()
    device = "rank" if hardware.gpu.is_cpu else "device"
    lines = [
        f"[bold {style}]{word}[/]: {estimate.fit_probability:.1%} chance to fit. A {device} needs "
        f"{format_bytes(memory.expected_bytes)} of {format_bytes(hardware.gpu.memory_bytes)}, "
        f"with 90% between {format_bytes(low)} and {format_bytes(high)}.",
    ]
    need, have = memory.peak.node_host_bytes(hardware.gpus_per_node), hardware.host_memory_bytes
    if need:
        parts = []
        if memory.host_bytes:
            parts.append(f"{format_bytes(memory.host_bytes)} a rank")
        if memory.gather_host_bytes:
            parts.append(f"{format_bytes(memory.gather_host_bytes)} to save the weights")
        lines.append(
            f"The host of the first node needs {format_bytes(need)} of {format_bytes(have)}: "
            f"{' and '.join(parts)}."
        )
    traced = memory.activations_from == "traced"
    source = "traced from the model's code" if traced else f"from the {memory.activations_from}"
    return [*lines, f"{error_words(memory)} Activations are {source}."]


def components_table(memory: MemoryEstimate) -> Table:
    """Return the components at the peak instant, the largest first."""
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column(f"at the peak ({_words(memory.peak_instant)})", overflow="fold")
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    shares = sorted(memory.components.items(), key=lambda item: -item[1])
    for name, value in shares:
        if value:
            table.add_row(_words(name), _gib(value), f"{value / memory.total_bytes:.0%}")
    table.add_row("total", _gib(memory.total_bytes), "", style="bold")
    if memory.expected_bytes != memory.total_bytes:
        factor = f"x {memory.expected_bytes / memory.total_bytes:.2f}"
        table.add_row("as runs measured", _gib(memory.expected_bytes), factor, style="bold")
    return table


def instants_table(memory: MemoryEstimate) -> Table:
    """Return the memory at each instant of a step, in its order."""
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("instant of a step", overflow="fold")
    table.add_column("GiB", justify="right", no_wrap=True)
    for name, value in memory.instants.items():
        style = "bold" if name == memory.peak_instant else None
        table.add_row(_words(name), _gib(value), style=style)
    return table


def advice_table(advice: Sequence[Advice], *, wide: bool) -> Table:
    """Return what would free most, each change by itself."""
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("one change that frees memory", overflow="fold")
    table.add_column("frees", justify="right", no_wrap=True)
    table.add_column("leaves", justify="right", no_wrap=True)
    table.add_column("fits", justify="right", no_wrap=True)
    host = wide and any(each.memory.host_bytes for each in advice)
    if host:
        table.add_column("host, a rank", justify="right", no_wrap=True)
    for each in advice:
        row = [
            each.change.text,
            format_bytes(each.freed_bytes),
            format_bytes(each.memory.expected_bytes),
            f"[{VERDICT_STYLES[each.verdict]}]{each.fit_probability:.0%}[/]",
        ]
        if host:
            row.append(format_bytes(each.memory.host_bytes) if each.memory.host_bytes else "")
        table.add_row(*row)
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _gib(num_bytes: int) -> str:
    gib = num_bytes / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.4f}"
