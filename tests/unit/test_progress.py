"""Progress on a terminal and in a log, and the final answer on the console."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from autotune.report.console import LiveProgress, print_result
from autotune.report.study import load_study
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import (
    make_failure,
    make_plan,
    make_record,
    typical_records,
    write_study,
)


class Clock:
    """Seconds, moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _search(console, *, total=2, budget_s=600.0, **more):
    """Two launches: one ladder that ends in an OOM, one slower configuration."""
    clock = Clock()
    progress = LiveProgress(console, clock=clock)
    progress.start(total, budget_s, **more)
    progress.launch_started(1, "zero2 mbs=4,8 [2 ranks]")
    clock.now += 30
    progress.rung_done(make_record(make_plan("zero2", 4), step_s=2.0))
    progress.rung_done(make_failure(make_plan("zero2", 8)))
    clock.now += 10
    progress.launch_done(1)
    progress.note("one \x1b[2Jnote")
    progress.launch_started(2, "zero3 mbs=4")
    clock.now += 20
    progress.rung_done(make_record(make_plan("zero3", 4), step_s=3.0))
    return progress, clock


def _plain(width=80):
    out = io.StringIO()
    return Console(file=out, width=width), out


@pytest.mark.parametrize("width", [20, 60, 200])
def test_without_a_terminal_each_event_is_one_plain_line(width):
    console, out = _plain(width)
    progress, _ = _search(console)
    progress.launch_done(2)
    progress.stop()
    assert out.getvalue().splitlines() == [
        "[1/2] running zero2 mbs=4,8 [2 ranks]",
        "  zero2 mbs=4 x ga=8: 16,384 tokens/s, 625.0 MiB a rank, step 2.00 s, "
        "\N{PLUS-MINUS SIGN}2%  best so far",
        "  zero2 mbs=8 x ga=4: out of memory: rank 1: RuntimeError: [enforce fail at "
        "alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't al...",
        "[1/2] done in 40.0 s, 9 min 20 s of the budget left",
        "one note",
        "[2/2] running zero3 mbs=4",
        "  zero3 mbs=4 x ga=8: 10,923 tokens/s, 560.0 MiB a rank, step 3.00 s, "
        "\N{PLUS-MINUS SIGN}2%",
        "[2/2] done in 20.0 s, 9 min 00 s of the budget left",
    ]


def test_without_a_budget_the_time_left_is_an_estimate_from_the_launches():
    console, out = _plain()
    _search(console, total=4, budget_s=None)
    assert "[1/4] done in 40.0 s, about 2 min 00 s left" in out.getvalue()


def test_without_any_limit_the_families_give_the_estimate():
    console, out = _plain()
    progress, _ = _search(console, total=None, budget_s=None, launches_left=3)
    assert "[1] done in 40.0 s, about 1 min 20 s left" in out.getvalue()
    assert progress._share_done() == pytest.approx(1 / 3)


def test_without_any_limit_nothing_is_said_about_the_time_left():
    console, out = _plain()
    _search(console, total=None, budget_s=None)
    assert "[1] done in 40.0 s\n" in out.getvalue()


def _terminal(width, monkeypatch, **environment):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=True), out


def _live_lines(progress, width):
    """The lines kept at the bottom, as they stand now."""
    console = Console(file=io.StringIO(), width=width)
    console.print(progress._render())
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 200])
def test_terminal_keeps_what_runs_and_the_best_within_the_width(width, monkeypatch):
    console, _ = _terminal(width, monkeypatch)
    progress, clock = _search(console)
    clock.now += 5
    try:
        lines = _live_lines(progress, width)
    finally:
        progress.stop()
    assert len(lines) == 5
    assert all(len(line) <= width for line in lines)
    assert lines[1].startswith("time   1 min 05 s, 8 min 55 s of the bu")
    assert lines[2] == "trials 2 measured, 1 failed"
    assert lines[3].startswith("best   zero2 mbs=4 x ga=8: 16,384")
    assert lines[4] == "now    [2/2] 25.0 s  zero3 mbs=4"
    if width >= 60:
        assert lines[1].endswith("of the budget left") and "625.0 MiB" in lines[3]


def test_terminal_gives_the_screen_back(monkeypatch):
    console, out = _terminal(60, monkeypatch)
    progress, _ = _search(console)
    assert "\x1b[?25l" in out.getvalue(), "the cursor is hidden while the lines move"
    progress.stop()
    progress.stop()
    assert out.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in out.getvalue()
    size = len(out.getvalue())
    progress.note("after")
    assert out.getvalue()[size:] == "after\n"


def test_no_color_is_respected(monkeypatch):
    import re

    colour = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    console, out = _terminal(60, monkeypatch, NO_COLOR="1")
    _search(console)[0].stop()
    assert not colour.search(out.getvalue())
    console, out = _terminal(60, monkeypatch)
    _search(console)[0].stop()
    assert colour.search(out.getvalue()), "the check sees colours where they are allowed"


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    console, out = _terminal(200, monkeypatch, TERM="dumb", NO_COLOR="1")
    _search(console)[0].stop()
    assert "\x1b[?25l" not in out.getvalue()
    assert "[1/2] running zero2" in out.getvalue()


def test_resumed_search_counts_what_was_known(monkeypatch):
    console, _ = _terminal(80, monkeypatch)
    clock = Clock()
    progress = LiveProgress(console, clock=clock)
    known = [make_record(make_plan("zero2"), step_s=2.0, launch=3), make_failure(make_plan())]
    progress.start(6, None, known=known)
    progress.launch_started(4, "zero3")
    clock.now += 50
    progress.rung_done(make_record(make_plan("zero3"), step_s=3.0, launch=4))
    progress.launch_done(4)
    lines = _live_lines(progress, 80)
    progress.stop()
    assert lines[1] == "time   50.0 s, about 1 min 40 s left"
    assert lines[2] == "trials 2 measured, 1 failed"
    assert lines[3].startswith("best   zero2")
    assert lines[4] == "now    choosing what to run next"


def test_failed_trial_never_becomes_the_best():
    console, out = _plain()
    progress = LiveProgress(console)
    progress.start(1, None)
    near = make_record(make_plan(), outcome=Outcome.THRASH, message="7 allocator retries")
    progress.rung_done(near)
    assert "too near the limit: 7 allocator retries" in out.getvalue()
    assert "best so far" not in out.getvalue()


@pytest.mark.parametrize("width", [60, 200])
def test_result_table_and_answer_fit_the_width(tmp_path, width):
    console, out = _plain(width)
    print_result(load_study(write_study(tmp_path, typical_records())), console)
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert "  15,984 tokens/s" in text
    answer = text[text.index("Best: ") :].splitlines()
    assert [line for line in answer if line != line.rstrip()] == [], "spaces at the end of a line"
    flat = " ".join(text.split())
    assert "Best: zero2 mbs=4 x ga=8 15,984 tokens/s, 625.0 MiB a rank, step 2.05 s" in flat
    assert "16 configurations ran, 6 failed, 3 refused unrun." in flat
    assert "14,247*" in flat and "* composed" in flat
    assert ("predicted" in text) == (width == 200)


def test_result_without_a_winner_says_what_to_do(tmp_path):
    console, out = _plain()
    study = load_study(write_study(tmp_path, [make_failure(make_plan())], best_yml=None))
    print_result(study, console)
    assert "No configuration ran to the end." in out.getvalue()
    assert "Raise --memory-limit" in out.getvalue()


def test_markup_in_names_is_printed_as_it_is(tmp_path):
    plan = make_plan().to_dict() | {"strategy": "[red]zero2[/nope]"}
    records = [replace(make_record(make_plan()), plan=plan)]
    console, out = _plain(120)
    print_result(load_study(write_study(tmp_path, records)), console)
    assert "Best: [red]zero2[/nope] mbs=4" in out.getvalue()
