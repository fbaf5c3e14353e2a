"""What a study knows: its records, and what they leave to be measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from autotune.planner import Estimate
from autotune.search.learning import by_family
from autotune.search.space import Family, hopeful, predicted_oom
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord


class Records(Protocol):
    """Where records are kept; see `autotune.trial.store.RecordStore`."""

    def get(self, plan_id: str) -> TrialRecord | None: ...  # noqa: D102
    def all(self) -> list[TrialRecord]: ...  # noqa: D102
    def add(self, records: Iterable[TrialRecord]) -> list[TrialRecord]: ...  # noqa: D102


class Judge(Protocol):
    """Judges estimates anew as trials finish; see `autotune.search.learning.Learner`."""

    def learn(self, family: Family, records: Sequence[TrialRecord]) -> None: ...  # noqa: D102
    def judged(self, family: Family) -> Family: ...  # noqa: D102


class Book:
    """Families, records and judge of one study: which rungs are open, which are ruled out.

    What is ruled out stays a bound: it has no record, for nobody measured it.
    """

    def __init__(self, families: Sequence[Family], store: Records, judge: Judge | None) -> None:
        self.families = {family.name: family for family in families}
        self.store = store
        self._judge = judge
        self._judged: dict[str, Family] = {}
        self._plan_ids = {
            family.name: {e.plan.micro_batch_size: e.plan.id for e in family.ladder}
            for family in families
        }

    def open_rungs(self) -> dict[str, list[Estimate]]:
        """Return the rungs that can still be measured, ascending, by family; none without any.

        None above a failure, and none above the first that what was measured so far rules out; that
        one only where the launch is paid for by a rung below.
        """
        found = {name: self.open_of(family) for name, family in self.families.items()}
        return {name: rungs for name, rungs in found.items() if rungs}

    def open_of(self, family: Family) -> list[Estimate]:
        """Return the open rungs of one family."""
        return hopeful(self._unmeasured(family))

    def left_out(self) -> list[dict[str, Any]]:
        """Return the plans of the space that measured trials rule out by now, with the reason."""
        found = []
        for family in self.families.values():
            unmeasured = self._unmeasured(family)
            found += [predicted_oom(e) for e in unmeasured[len(hopeful(unmeasured)) :]]
        return found

    def judged(self, family: Family) -> Family:
        """Return the family with its estimates under what is known by now."""
        if self._judge is None:
            return family
        found = self._judged.get(family.name)
        if found is None:
            found = self._judged[family.name] = self._judge.judged(family)
        return found

    def family_of(self, record: TrialRecord) -> Family | None:
        """Return the family a record is of."""
        return self.family_by_id(record.plan_object.family_id)

    def family_by_id(self, family_id: str) -> Family | None:
        """Return the family whose plans share this id; None where the space has none."""
        return next(
            (f for f in self.families.values() if f.ladder[0].plan.family_id == family_id), None
        )

    def add(self, family: Family, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Keep what was measured and learn from it; return what was not known before."""
        added = self.store.add(records)
        if self._judge is not None and added:
            self._judge.learn(family, added)
            self._judged.clear()
        return added

    def relearn(self) -> None:
        """Learn from the records of a study that is resumed."""
        if self._judge is None:
            return
        for family, records in by_family(self.families.values(), self.store.all()):
            self._judge.learn(family, records)
        self._judged.clear()

    def _unmeasured(self, family: Family) -> list[Estimate]:
        """Return the rungs without a record, as judged by now.

        What ran out of memory bounds those above it; what failed otherwise ends its family.
        """
        ids = self._plan_ids[family.name]
        records = {size: self.store.get(plan_id) for size, plan_id in ids.items()}
        if all(records.values()):
            return []
        rungs = []
        for estimate in self.judged(family).ladder:
            record = records[estimate.plan.micro_batch_size]
            if record is None:
                rungs.append(estimate)
            elif record.outcome in (Outcome.OOM, Outcome.HOST_OOM):
                return rungs
            elif record.outcome not in (Outcome.OK, Outcome.THRASH):
                return []
        return rungs
