"""Why each configuration is not the answer."""

from __future__ import annotations

import pytest

from autotune.report.answer import find_answer
from autotune.report.reasons import Reasons, readable_sizes, why_refused
from autotune.report.study import load_study
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import MIB, make_failure, make_plan, make_record, write_study


def _reasons(tmp_path, records, **changes):
    study = load_study(write_study(tmp_path, records, **changes))
    reasons = Reasons.of(study, find_answer(study))
    return [reasons.why_not(record) for record in study.records]


def test_slower_ones_say_by_how_much_and_against_which_noise(tmp_path):
    records = [
        make_record(make_plan("zero2"), step_s=2.0, noise=0.01),
        make_record(make_plan("zero1"), step_s=2.5, noise=0.01),
        make_record(make_plan("zero3"), step_s=2.02, noise=0.01),
        make_record(make_plan("fsdp2"), step_s=4.0, step_s_low=None),
    ]
    assert _reasons(tmp_path, records) == [
        "the answer",
        "20% slower, 17.7 times the noise",
        "a tie: 0.99% slower, within the noise of 1.4%",
        "50% slower; its noise was not measured",
    ]


def test_a_figure_beyond_the_noise_is_never_below_it_in_words(tmp_path):
    """73% ahead of it is 42% behind: beside a noise of 45% that would read like a tie."""
    records = [
        make_record(make_plan("zero2"), step_s=2.0, noise=0.01),
        make_record(make_plan("zero1"), step_s=3.46, noise=0.45),
    ]
    assert _reasons(tmp_path, records)[1] == "42% slower, 1.6 times the noise"


def test_out_of_memory_says_what_was_asked_the_limit_and_what_fitted(tmp_path):
    message = "at accumulation 1: no memory for 16777216 bytes more"
    records = [
        make_record(make_plan("zero2", 2), peak_reserved_bytes=500 * MIB),
        make_record(make_plan("zero2", 4), peak_reserved_bytes=600 * MIB),
        make_failure(make_plan("zero2", 8), message=message),
        make_failure(make_plan("zero3", 8), message=message),
        make_record(make_plan("zero2", 16), peak_reserved_bytes=650 * MIB),
    ]
    reasons = _reasons(tmp_path, records)
    assert reasons[2] == (
        "at accumulation 1: no memory for 16.0 MiB more; limit 700.0 MiB a rank; "
        "predicted 900.0 MiB; micro batch 4 took 600.0 MiB"
    )
    assert "took" not in reasons[3], "no smaller micro batch of this strategy ran"


def test_other_failures_give_their_first_line(tmp_path):
    records = [
        make_failure(make_plan("zero2"), Outcome.CRASHED, "\n  boom: 5\nTraceback"),
        make_failure(make_plan("zero3"), Outcome.HANG, ""),
    ]
    assert _reasons(tmp_path, records) == ["boom: 5", "no reason was recorded"]


def test_a_plan_measured_again_points_to_its_last_launch(tmp_path):
    records = [
        make_record(make_plan("zero2"), step_s=2.0, launch=1),
        make_record(make_plan("zero2"), step_s=2.1, launch=3),
    ]
    assert _reasons(tmp_path, records) == ["measured again in launch 3", "the answer"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"code": "AT106", "reason": "4 heads"}, "refused by rule AT106: 4 heads"),
        ({"code": "PREDICTED_OOM", "reason": "predicted 9 GiB"}, "predicted 9 GiB"),
        ({"reason": "\x1b[1mno code"}, "no code"),
    ],
)
def test_refused_plans_name_their_rule(entry, words):
    assert why_refused(entry) == words


def test_byte_counts_become_sizes_and_small_ones_stay():
    assert readable_sizes("asked 134217728 bytes, got 12 bytes") == "asked 128.0 MiB, got 12 bytes"
