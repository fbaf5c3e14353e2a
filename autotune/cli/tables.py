"""Predictions as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from autotune.memory import MemoryEstimate, Verdict
from autotune.memory.setup import unestimated
from autotune.planner import Estimate
from autotune.spec.hardware import HardwareSpec
from autotune.spec.workload import Lora, Workload
from autotune.units import GIB, format_duration

VERDICT_STYLES = {Verdict.FITS: "green", Verdict.AT_RISK: "yellow", Verdict.OOM: "red"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`; rich would exit with 1."""
        raise BrokenPipeError


def make_console() -> Console:
    """Return the console for stdout."""
    return _Console()


def format_count(count: int) -> str:
    """Write a count of parameters as ``8.19 billion`` or ``4.2 million``."""
    rounded = float(f"{count:.3g}")  # first, so that 999.9 million is 1 billion
    return f"{rounded / 1e9:g} billion" if rounded >= 1e9 else f"{rounded / 1e6:g} million"


def describe_workload(workload: Workload) -> str:
    """Return the workload in one line, defaults included."""
    words = [
        f"sequence {workload.seq_len}",
        f"global batch {workload.global_batch_size}",
        workload.optimizer,
        str(workload.precision),
        "packed" if workload.packing else "not packed",
    ]
    if workload.adapter is not None:
        words.append(adapter_words(workload.adapter))
    if workload.liger:
        words.append(f"Liger ({', '.join(workload.liger)})")
    if workload.chunked_loss:
        words.append("chunked loss")
    if workload.activation_offloading:
        words.append("activations offloaded")
    if workload.fp8:
        words.append("fp8 projections" + ", gathered in fp8" * workload.fp8_all_gather)
    if missing := unestimated(workload):
        words.append(f"memory estimated without {' and '.join(missing)}")
    return ", ".join(words)


def adapter_words(adapter: Lora) -> str:
    """Return an adapter in a few words, such as ``rsLoRA r=16 over nf4``."""
    name = "DoRA" if adapter.dora else "LoRA"
    base = f" over {adapter.base_storage}" if adapter.base_storage else ""
    return f"{'rs' * adapter.rslora}{name} r={adapter.r}{base}"


def error_words(memory: MemoryEstimate) -> str:
    """Say what the interval of an estimate rests on."""
    residual = memory.residual
    low, high = residual.interval
    spread = f"{low - 1:+.0%} to {high - 1:+.0%} around the formulas"
    if not residual.count:
        return f"Predicted, not measured; the error is {residual.source} ({spread})."
    runs = f"{residual.count} measured run{'s' * (residual.count > 1)}"
    return f"Predicted; the error is that of {runs} ({residual.source}): {spread}."


def candidates_table(estimates: Sequence[Estimate], hardware: HardwareSpec, *, wide: bool) -> Table:
    """Return one row a plan, best first; the narrow form keeps the answer and the fit."""
    digits = 1 if hardware.gpu.memory_bytes >= 10 * GIB else 2
    capacity = f"{hardware.gpu.memory_bytes / GIB:.{digits}f}"
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("configuration", overflow="fold", ratio=1 if not wide else None)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column(f"GiB of {capacity}", justify="right", no_wrap=wide)
    table.add_column("fits", no_wrap=True)
    if wide:
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("MFU", justify="right", no_wrap=True)
        table.add_column("90% interval, GiB", justify="right", no_wrap=True)
        table.add_column("peak at", no_wrap=True)
    for rank, estimate in enumerate(estimates, 1):
        peak, time = estimate.peak, estimate.time
        low, high = peak.interval_bytes
        row = [
            str(rank),
            estimate.plan.describe(),
            f"{time.tokens_per_s:,.0f}",
            f"{peak.expected_bytes / GIB:.2f}",
            f"[{VERDICT_STYLES[estimate.verdict]}]{estimate.fit_probability:.0%}[/]",
        ]
        if wide:
            row += [
                format_duration(time.step_s),
                f"{time.mfu:.0%}",
                f"{low / GIB:.{digits}f} to {high / GIB:.{digits}f}",
                estimate.memory.peak_instant,
            ]
        table.add_row(*row)
    return table


def components_table(estimates: Sequence[Estimate]) -> Table:
    """Return the memory of each plan's peak instant by component."""
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("memory at the peak, GiB")
    for rank in range(1, len(estimates) + 1):
        table.add_column(f"#{rank}", justify="right", no_wrap=True)
    names = dict.fromkeys(name for e in estimates for name in e.memory.components)
    for name in names:
        values = [e.memory.components.get(name, 0) for e in estimates]
        if any(values):
            table.add_row(name.replace("_", " "), *(f"{value / GIB:.2f}" for value in values))
    table.add_row("total", *(f"{e.memory.total_bytes / GIB:.2f}" for e in estimates), style="bold")
    if any(e.peak.expected_bytes != e.peak.total_bytes for e in estimates):
        expected = (f"{e.peak.expected_bytes / GIB:.2f}" for e in estimates)
        table.add_row("as runs measured", *expected, style="bold")
    if any(e.memory.host_bytes for e in estimates):
        hosts = (f"{e.memory.host_bytes / GIB:.2f}" for e in estimates)
        table.add_row("host memory a rank", *hosts)
    return table


def time_table(estimate: Estimate) -> Table:
    """Return the parts of one optimizer step."""
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("time of a step")
    table.add_column("", justify="right")
    for name, value in estimate.time.components.items():
        table.add_row(name.removesuffix("_s").replace("_", " "), format_duration(value))
    table.add_row("step", format_duration(estimate.time.step_s), style="bold")
    return table
