"""What the cells come to: smallest, fastest, cheapest, within a deadline, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.capacity.cells import Cell, Fit, Question
from autotune.errors import AutotuneError, NothingFitsError
from autotune.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Cells that answer a question; None where no cell does."""

    smallest: Mapping[str, Cell | None]
    """Of each GPU type, the smallest count that fits."""
    fastest: Cell
    cheapest: Cell | None
    """By cost; None without a price or a length of the training."""
    in_time: Cell | None
    """The cheapest that meets the deadline: by cost where priced, else by GPU-hours."""
    smallest_in_time: Mapping[str, Cell | None]
    """Of each GPU type, the smallest count that meets the deadline; empty without one."""
    most_tokens: Cell | None
    """Of what the budget pays for, or of what ends in time where no length is asked for."""
    most_tokens_by_type: Mapping[str, Cell | None]
    """The same of each GPU type; empty where a length is asked for."""
    in_both: Sequence[Cell] | None
    """Those within budget and deadline; None unless both and a length are given."""
    cheapest_in_both: Cell | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: each cell by type and count."""
        return {
            "smallest_that_fits": {t: _count(cell) for t, cell in self.smallest.items()},
            "fastest": _name(self.fastest),
            "cheapest": _name(self.cheapest),
            "cheapest_in_time": _name(self.in_time),
            "smallest_in_time": {t: _count(cell) for t, cell in self.smallest_in_time.items()},
            "most_tokens_in_budget": _name(self.most_tokens) if self._is_paid else None,
            "most_tokens_in_deadline": None if self._is_paid else _name(self.most_tokens),
            "most_tokens": {t: _count(cell) for t, cell in self.most_tokens_by_type.items()},
            "within_budget_and_deadline": None
            if self.in_both is None
            else [_name(cell) for cell in self.in_both],
            "cheapest_within_both": _name(self.cheapest_in_both),
        }

    @property
    def _is_paid(self) -> bool:
        return self.fastest.question.budget is not None


def find_answers(question: Question, cells: Sequence[Cell]) -> Answers:
    """Choose among the cells that fit; among those at risk only when nothing fits.

    Raises:
        NothingFitsError: no cell has a chance to fit.
        AutotuneError: there is no legal cell at all.
    """
    usable = [c for c in cells if c.fit is Fit.FITS] or [c for c in cells if c.runs]
    if not usable:
        raise _nothing(cells)
    types = dict.fromkeys(cell.gpu_type for cell in cells)
    in_time = [cell for cell in usable if cell.meets_deadline]
    has_deadline = question.deadline_s is not None and question.tokens is not None

    def smallest(among: Sequence[Cell]) -> dict[str, Cell | None]:
        own = by_type(among)
        return {t: min(found, key=lambda c: c.num_gpus, default=None) for t, found in own.items()}

    def by_type(among: Sequence[Cell]) -> dict[str, list[Cell]]:
        return {t: [cell for cell in among if cell.gpu_type == t] for t in types}

    def most(among: Sequence[Cell]) -> Cell | None:
        return _least(among, lambda c: c.most_tokens and -c.most_tokens)

    in_both = None
    if has_deadline and question.budget is not None:
        in_both = [cell for cell in in_time if cell.within_budget]
    asks_for_tokens = question.tokens is None

    return Answers(
        smallest=smallest([cell for cell in cells if cell.fit is Fit.FITS]),
        fastest=max(usable, key=lambda c: c.tokens_per_s or 0),
        cheapest=_least(usable, lambda c: c.cost) if question.tokens is not None else None,
        in_time=_least(in_time, lambda c: c.cost) or _least(in_time, lambda c: c.gpu_hours),
        smallest_in_time=smallest(in_time) if has_deadline else {},
        most_tokens=most(usable) if asks_for_tokens or question.budget is not None else None,
        most_tokens_by_type={t: most(own) for t, own in by_type(usable).items()}
        if asks_for_tokens
        else {},
        in_both=in_both,
        cheapest_in_both=_least(in_both or [], lambda c: c.cost),
    )


def _least(cells: Sequence[Cell], key: Callable[[Cell], float | None]) -> Cell | None:
    """Return the cell of the least value, of equal ones the sooner done; None without values."""
    valued = [(value, cell.train_s or 0.0, cell) for cell in cells if (value := key(cell))]
    return min(valued, key=lambda entry: entry[:2])[2] if valued else None


def _nothing(cells: Sequence[Cell]) -> AutotuneError:
    short = [cell for cell in cells if cell.missing_bytes is not None]
    if not short:
        reasons = dict.fromkeys(f"{cell.describe()}: {cell.reason}" for cell in cells)
        return AutotuneError(f"No cell can be planned. {' '.join(list(reasons)[:3])}")
    closest = min(short, key=lambda cell: cell.missing_bytes or 0)
    missing = format_bytes(closest.missing_bytes or 0)
    return NothingFitsError(
        f"Nothing fits in any of {len(cells)} cells. Closest: {closest.describe()}, {missing} "
        f"short. {closest.reason}"
    )


def _name(cell: Cell | None) -> dict[str, Any] | None:
    return {"gpu_type": cell.gpu_type, "num_gpus": cell.num_gpus} if cell else None


def _count(cell: Cell | None) -> int | None:
    return cell.num_gpus if cell else None
