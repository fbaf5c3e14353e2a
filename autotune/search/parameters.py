"""The space of a study in Optuna's words: a family, and a micro batch of that family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution

from autotune.search.space import Family

FAMILY = "family"
_MICRO_BATCH = "micro_batch_size of "


def ladder_parameter(family: Family) -> str:
    """Return the name of a family's own micro-batch parameter."""
    return _MICRO_BATCH + family.name


def distributions(families: Sequence[Family]) -> dict[str, BaseDistribution]:
    """Return every parameter of the space: the family, and each family's micro batches."""
    space: dict[str, BaseDistribution] = {
        FAMILY: CategoricalDistribution([family.name for family in families])
    }
    return space | {ladder_parameter(family): micro_batches(family) for family in families}


def micro_batches(family: Family) -> CategoricalDistribution:
    """Return the distribution of a family's micro batch."""
    return CategoricalDistribution([e.plan.micro_batch_size for e in family.ladder])


def params_of(family: Family, micro_batch_size: int) -> dict[str, str | int]:
    """Return the parameters of one rung."""
    return {FAMILY: family.name, ladder_parameter(family): micro_batch_size}


def size_in(params: Mapping[str, object], family: Family) -> int | None:
    """Return the micro batch that parameters give a family; None where they give none."""
    size = params.get(ladder_parameter(family))
    return size if isinstance(size, int) else None
