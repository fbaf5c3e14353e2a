"""Where a ladder's rungs come from, on a single rank; several are in `test_fork_server.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.runner.orders import AskedOrders, SilentSupervisorError, make_orders
from autotune.trial.protocol import Rung, RungOrder, rung_file, write_message
from tests.integration.ranks import make_plan, trial_request

pytestmark = pytest.mark.integration


def test_listed_rungs_come_in_order_and_end(tmp_path: Path) -> None:
    request = trial_request(make_plan("ddp", 1), tmp_path, rungs=[(1, 4), (2, 2)])
    orders = make_orders(request, tmp_path, progress=lambda: None)
    taken = [orders.next() for _ in range(3)]
    assert [order and order.rung for order in taken] == [*request.rungs, None]


def test_asked_rungs_are_those_of_the_own_launch_and_silence_has_a_limit(tmp_path: Path) -> None:
    request = trial_request(
        make_plan("ddp", 1), tmp_path, rungs=[], converses=True, idle_limit_s=0.1
    )
    beats: list[int] = []
    orders = AskedOrders(request, tmp_path, progress=lambda: beats.append(1))
    own = RungOrder(
        launch_id=request.launch_id,
        rung=Rung(micro_batch_size=2, grad_accum_steps=4),
        give_up_step_s=0.5,
    )
    write_message(own, tmp_path / rung_file(1))
    assert orders.next() == own
    write_message(own.model_copy(update={"launch_id": "another"}), tmp_path / rung_file(2))
    with pytest.raises(SilentSupervisorError, match=r"nothing in 0 s: no order 2"):
        orders.next()
    assert beats
    write_message(own.model_copy(update={"rung": None}), tmp_path / rung_file(3))
    assert orders.next() is None
