"""The words and figures of a capacity plan, so that console and page say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autotune.capacity import Answers, Calibration, Cell, Fit, Question
from autotune.units import GIB, short_count

FIT_WORDS = {Fit.FITS: "fits", Fit.AT_RISK: "at risk", Fit.OOM: "no", Fit.REFUSED: "refused"}
_SCIENTIFIC_BELOW = 1e-6
NO_FIGURE = "\N{EM DASH}"


def figure(value: float | None) -> str:
    """Write a number with at least three significant figures, or a dash."""
    if value is None:
        return NO_FIGURE
    if 0 < value < _SCIENTIFIC_BELOW:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def count_words(tokens: float | None) -> str:
    """Write tokens as ``10B`` or ``512M``, or a dash."""
    return NO_FIGURE if tokens is None else short_count(tokens)


def fit_words(cell: Cell) -> str:
    """Say whether the cell fits, and by how much it does not."""
    if cell.fit is Fit.AT_RISK and cell.best is not None:
        return f"{FIT_WORDS[cell.fit]}, {cell.best.fit_probability:.0%}"
    if cell.missing_bytes is not None:
        return f"no, +{cell.missing_bytes / GIB:.1f} GiB"
    return FIT_WORDS[cell.fit]


def configuration(cell: Cell) -> str:
    """Return the best configuration, the closest one of a cell that fits not, or a dash."""
    return cell.best.plan.describe() if cell.best else NO_FIGURE


def title(question: Question) -> str:
    """Return what is asked, in one line."""
    if question.tokens is not None:
        return f"{question.model.name}: {count_words(question.tokens)} tokens"
    limits = []
    if question.budget is not None:
        limits.append(f"a budget of {figure(question.budget)}")
    if question.deadline_s is not None:
        limits.append(f"{_days(question)} days")
    return f"{question.model.name}: what can be trained in {' and '.join(limits)}"


def _days(question: Question) -> str:
    return f"{(question.deadline_s or 0) / 86400:.4g}"


def answer_lines(question: Question, answers: Answers) -> list[tuple[str, str]]:
    """Return each answer as a label and its words."""
    lines = [("Smallest that fits", _by_type(answers.smallest))]
    fastest = answers.fastest
    lines.append(("Fastest", f"{fastest.describe()}: {_takes(fastest)}"))
    if answers.cheapest is not None:
        lines.append(("Cheapest", f"{answers.cheapest.describe()}: {_takes(answers.cheapest)}"))
    if question.deadline_s is not None and question.tokens is not None:
        label = f"Within {_days(question)} days"
        if answers.in_time is None:
            lines.append((label, f"no cell; the fastest takes {figure(fastest.days)} days"))
        else:
            lines.append((label, f"{answers.in_time.describe()}: {_takes(answers.in_time)}"))
            lines.append(("Smallest in time", _by_type(answers.smallest_in_time)))
    if question.budget is not None:
        label = f"Budget of {figure(question.budget)}"
        best = answers.most_tokens
        if best is None:
            words = "no cell that fits has a price"
        else:
            words = f"{best.describe()}: {count_words(best.tokens_in_budget)} tokens at most"
            if question.deadline_s is not None:
                words += f", within {_days(question)} days"
        lines.append((label, words))
    elif question.tokens is None and answers.most_tokens is not None:
        label = f"Within {_days(question)} days"
        lines.append((label, f"{answers.most_tokens.describe()}: {_buys(answers.most_tokens)}"))
    if question.tokens is None:
        lines.append(("Most of each type", _most_by_type(answers.most_tokens_by_type)))
    if answers.in_both is not None:
        lines += _both_lines(question, answers)
    return lines


def _both_lines(question: Question, answers: Answers) -> list[tuple[str, str]]:
    label = "Cheapest within both"
    if answers.cheapest_in_both is None:
        within = f"a budget of {figure(question.budget)} and {_days(question)} days"
        return [(label, f"no cell keeps {within}")]
    names = ", ".join(cell.describe() for cell in answers.in_both or ())
    best = answers.cheapest_in_both
    return [("Within both", names), (label, f"{best.describe()}: {_takes(best)}")]


def keeps(cell: Cell) -> str:
    """Say which limits a training of the length asked for keeps."""
    if not cell.runs:
        return NO_FIGURE
    kept = [
        name
        for name, is_kept in (("budget", cell.within_budget), ("deadline", cell.meets_deadline))
        if is_kept
    ]
    return "both" if len(kept) == 2 else kept[0] if kept else "neither"


def has_both_limits(question: Question) -> bool:
    """Say whether a training of one length has to keep a budget and a deadline."""
    return None not in (question.tokens, question.budget, question.deadline_s)


def limit_words(question: Question) -> str:
    """Name what limits the tokens where no length is asked for."""
    if question.budget is None:
        return "by the deadline"
    return "within the budget" + " and the deadline" * (question.deadline_s is not None)


def asks_what_the_deadline_allows(question: Question) -> bool:
    """Say whether a deadline is all that is given."""
    return question.tokens is None and question.budget is None


def notes(question: Question, cells: Sequence[Cell], calibration: Calibration | None) -> list[str]:
    """Say what the figures rest on and leave out."""
    said = [
        "Time is tokens over tokens/s: no start-up, evaluation, checkpoints or failures."
        if question.tokens is not None
        else f"Tokens are what can be trained {limit_words(question)}, without start-up, "
        "evaluation or failures."
    ]
    if question.prices:
        said.append("Cost is GPU-hours at the price given, in its currency.")
        unpriced = [t for t in dict.fromkeys(c.gpu_type for c in cells) if t not in question.prices]
        if unpriced:
            said.append(f"No price was given for {', '.join(unpriced)}: left out of every cost.")
    if question.with_power:
        said.append(
            "kWh are the GPUs' boards at their TDP throughout: an upper bound for them, without "
            "hosts, network and cooling."
        )
    if any(cell.runs and not cell.factors for cell in cells):
        said.append(
            "Predicted, not measured: closed formulas with assumed efficiencies. 'autotune search' "
            "measures; --calibrate takes its study."
        )
    if calibration is not None:
        said += _calibration_notes(calibration) + _mixed_note(cells)
    said += _type_notes(cells)
    return said


def reasons(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Return the cells without a configuration, each with its reason, equal ones together."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        if cell.reason:
            groups.setdefault(cell.reason, []).append(cell.describe())
    return [(", ".join(names), reason) for reason, names in groups.items()]


def _takes(cell: Cell) -> str:
    parts = [f"{figure(cell.tokens_per_s)} tokens/s"]
    if cell.days is not None:
        parts.append(f"{figure(cell.days)} days")
    if cell.cost is not None:
        parts.append(f"cost {figure(cell.cost)}")
    return ", ".join(parts)


def _by_type(cells: Mapping[str, Cell | None]) -> str:
    return "; ".join(
        f"{t}: {cell.num_gpus if cell else 'none of the counts'}" for t, cell in cells.items()
    )


def _buys(cell: Cell) -> str:
    words = f"{count_words(cell.most_tokens)} tokens at most"
    return words if cell.cost is None else f"{words}, cost {figure(cell.cost)}"


def _most_by_type(cells: Mapping[str, Cell | None]) -> str:
    return "; ".join(
        f"{t}: {count_words(cell.most_tokens)} on {cell.num_gpus}" if cell else f"{t}: nothing fits"
        for t, cell in cells.items()
    )


def _calibration_notes(calibration: Calibration) -> list[str]:
    factors = ", ".join(
        f"{engine} x{own.tokens_per_s:.2f} in tokens/s and x{own.memory:.2f} in memory "
        f"({own.num_trials} trial{'s' * (own.num_trials > 1)})"
        for engine, own in calibration.by_engine.items()
    )
    return [
        f"{calibration.gpu_type} is calibrated by {calibration.study}: {factors}; other engines "
        f"by all its trials. That carries over how far this model's kernels on this GPU are from "
        "the assumed efficiencies; not the links between other counts of GPUs or nodes, other "
        "sequence lengths, or offload.",
        *calibration.notes,
    ]


def _mixed_note(cells: Sequence[Cell]) -> list[str]:
    if len({cell.basis for cell in cells if cell.runs}) < 2:
        return []
    return [
        "Compare calibrated and predicted cells with care: a GPU type without a study may be as "
        "far off as the calibrated one was."
    ]


def _type_notes(cells: Sequence[Cell]) -> list[str]:
    gpus = {cell.gpu_type: cell.hardware.gpu for cell in cells if cell.hardware}
    return [f"{name}: {gpu.note}" for name, gpu in gpus.items() if gpu.note]


def memory_words(cell: Cell) -> str:
    """Return the GiB a device needs of those it has, or a dash."""
    if cell.best is None or cell.hardware is None:
        return NO_FIGURE
    have = cell.hardware.gpu.memory_bytes
    return f"{cell.best.memory.total_bytes / GIB:.1f} of {have / GIB:.1f}"
