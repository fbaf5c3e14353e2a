"""`eval_batch_size` is what a rank evaluates at once; every held-out row is still read once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autotune.config import load_config
from autotune.resources import cache_dir
from autotune.spec.workload import Workload
from tests.integration.ranks import make_plan, training_request

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("given", "size"), [(None, 8), (1, 1), (3, 3)])
def test_what_a_rank_evaluates_at_once(
    given: int | None, size: int, tmp_path: Path, corpus: Path
) -> None:
    from autotune.runner.data import build_sequences
    from autotune.runner.session import Session

    plan = make_plan("ddp", 1, micro_batch_size=8)
    request = training_request(
        plan, tmp_path, data=corpus, workload=Workload(seq_len=64, global_batch_size=8),
        val_set_size=16, eval_batch_size=given,
    )  # fmt: skip
    data = build_sequences(request, cache_dir() / "tokenized")
    answer = cast("Any", SimpleNamespace(rank=0))
    session = Session(request=request, plan=plan, answer=answer, gauge=cast("Any", None), data=data)
    loader = session.eval_loader()
    assert loader is not None and loader.batch_size == size
    batches = list(loader)
    assert {len(batch["input_ids"]) for batch in batches} == {size}
    tokens = sum(int((batch["shift_labels"] >= 0).sum()) for batch in batches)
    whole = Session(
        request=request.model_copy(update={"train": None}), plan=plan, answer=answer,
        gauge=cast("Any", None), data=data,
    ).eval_loader()  # fmt: skip
    assert whole is not None
    assert tokens == sum(int((batch["shift_labels"] >= 0).sum()) for batch in whole) > 0


def test_it_is_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yml"
    file.write_text("base_model: tiny-qwen3\nlearning_rate: 1e-4\neval_batch_size: 2\n")
    config = load_config(file)
    assert config.train.eval_batch_size == 2
    assert not config.passthrough and not config.warnings
