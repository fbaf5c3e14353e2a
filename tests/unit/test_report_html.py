"""The page: self-contained, escaped, and saying what was measured and what was not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest

from autotune.report.html import _script_json, render, write_html
from autotune.report.study import load_study
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import (
    OOM_MESSAGE,
    STRATEGIES,
    ended_summary,
    make_failure,
    make_plan,
    make_record,
    typical_records,
    write_study,
)

LOADING_ATTRIBUTES = {"src", "srcset", "href", "data", "poster", "action", "background", "ping"}


@dataclass
class Page(HTMLParser):
    """What a browser would make of the text: elements, script texts, visible text."""

    def __post_init__(self):
        super().__init__(convert_charrefs=True)

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    _inside: str = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles[-1] += data
        else:
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def parse(text):
    page = Page()
    page.feed(text)
    page.close()
    return page


def page_of(tmp_path, records=None, **changes):
    return parse(render(load_study(write_study(tmp_path, records, **changes))))


def figures_of(page):
    return json.loads(
        next(
            text
            for (_, attrs), text in zip(
                (element for element in page.elements if element[0] == "script"),
                page.scripts,
                strict=True,
            )
            if attrs.get("id") == "figures"
        )
    )


def outside_references(page):
    """Everything the page would fetch, or send to."""
    found = [
        f"<{tag} {name}={value}>"
        for tag, attrs in page.elements
        for name, value in attrs.items()
        if name in LOADING_ATTRIBUTES and not (value or "").startswith(("#", "data:,"))
    ]
    styles = [*page.styles, *(attrs.get("style") or "" for _, attrs in page.elements)]
    return found + re.findall(r"url\([^)]*\)|@import[^;]*", " ".join(styles))


def test_nothing_is_loaded_from_anywhere(tmp_path):
    assert outside_references(page_of(tmp_path)) == []


def test_the_check_for_outside_references_sees_them():
    text = (
        '<link href="https://a/b.css"><img src=//c/d.png><style>@import "e"; a { background: '
        'url(http://f) }</style><p style="background:url(g)"><a href="#in">'
    )
    assert len(outside_references(parse(text))) == 5


def test_policy_allows_the_page_its_own_scripts_alone(tmp_path):
    page = page_of(tmp_path)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    executable = [
        text
        for (_, attrs), text in zip(
            (element for element in page.elements if element[0] == "script"),
            page.scripts,
            strict=True,
        )
        if attrs.get("type") != "application/json"
    ]
    assert len(executable) == 3, "the theme's, plotly.js, the page's own"
    for text in executable:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == 3
    assert "script-src" in policy and "unsafe-inline" not in policy.split("style-src")[0]


HOSTILE = "</script><script>alert(1)</script><img src=http://x/ onerror=alert(2)>\"'&{{7*7}}"


def test_hostile_text_stays_text_wherever_it_stands(tmp_path):
    plan = make_plan("zero2").to_dict() | {"strategy": HOSTILE}
    records = [
        replace(make_record(make_plan("zero2"), log_dir=HOSTILE), plan=plan),
        make_record(make_plan("zero3"), step_s=2.1),
        make_failure(make_plan("zero1"), Outcome.CRASHED, f"{HOSTILE}\n{HOSTILE}"),
    ]
    summary = ended_summary(records) | {
        "stopped_because": HOSTILE,
        "rejected": [{"plan": plan, "code": HOSTILE, "reason": HOSTILE}],
    }
    contract = {
        "command": HOSTILE,
        "model": {"name": HOSTILE, HOSTILE: 1},
        "versions": {HOSTILE: HOSTILE},
        "strategies": [HOSTILE],
    }
    harmless = page_of(tmp_path / "a")
    page = page_of(
        tmp_path / "b", records, contract=contract, summary=summary, best_yml=f"# {HOSTILE}\n"
    )
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == [tag for tag, _ in harmless.elements].count("script")
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert outside_references(page) == []
    # Model, headline, rejected, contract, best.yml and more: all show it as it was typed.
    assert page.text.count("{{7*7}}") > 8
    names = [trace.get("name", "") for trace in figures_of(page)["throughput"]["data"]]
    assert any("&lt;script&gt;" in name for name in names), "plotly reads HTML in its labels"
    assert not any("<script>" in name for name in names)


def test_json_cannot_end_its_script_element():
    value = {"</script><!--": ["<script>", "a & b"]}
    text = _script_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_answer_stands_first_with_its_reason(tmp_path):
    text = page_of(tmp_path).text
    answer = text.index("Fastest configuration that fits zero2 mbs=4 x ga=8")
    assert answer < text.index("Why this one") < text.index("Throughput against memory")
    assert "15,984 tokens/s" in text
    assert "15,671 to 16,311 (95%)" in text
    assert "reserved, 89% of 700.0 MiB a rank" in text
    assert "Not told apart from it by this measurement: fsdp2_no_reshard mbs=4 x ga=8." in text
    assert "AT104" in text and "cp=8 does not divide" in text
    assert "fp32 master weights, bf16 compute" in text
    assert "base_model: tiny-qwen3" in text


def rows_of(text):
    """The cells of the table of all trials, a list a row."""
    table = text[text.index('<table id="trials">') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    return [
        [" ".join(parse(cell).text.split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
        for row in re.findall(r"<tr.*?</tr>", body, re.S)
    ]


def test_every_trial_has_its_row_and_unmeasured_cells_are_dashes(tmp_path):
    records = typical_records()
    rows = rows_of(render(load_study(write_study(tmp_path, records))))
    refused = [row for row in rows if row[1] == "refused"]
    assert len(rows) == len(records) + len(refused) and len(refused) == 3
    assert refused[0][4] == "refused by rule AT104: cp=8 does not divide the 4 key-value heads"
    failed = [row for row in rows if row[1] == "out of memory"]
    assert len(failed) == 5
    for row in failed:
        assert row[2:4] + row[5:9] == ["\N{EM DASH}"] * 6
        assert row[9] == "900.0 MiB"
    assert [row[0] for row in rows if "answer" in row[0]] == ["zero2 mbs=4 x ga=8 answer"]


def test_composed_times_are_marked_and_measured_ones_are_not(tmp_path):
    run = make_record(make_plan("zero2"), step_s=2.0)
    composed = make_record(make_plan("zero3"), step_s=2.5, measured_accum_steps=(1, 2))
    text = render(load_study(write_study(tmp_path, [run, composed])))
    cells = {row[0].split()[0]: row for row in rows_of(text) if row[1] == "ok"}
    assert cells["zero2"][2] == "16,384" and cells["zero2"][5] == "2.00 s"
    assert cells["zero3"][2] == "13,107*" and cells["zero3"][5] == "2.50 s*"
    assert "* composed: the plan's own accumulation was not run" in parse(text).text
    only_run = parse(render(load_study(write_study(tmp_path / "b", [run])))).text
    assert "composed:" not in only_run


def test_composed_marks_are_hollow_in_the_charts(tmp_path):
    run = make_record(make_plan("zero2"), step_s=2.0)
    composed = make_record(make_plan("zero2", 2), step_s=2.5, measured_accum_steps=(1, 2))
    traces = figures_of(page_of(tmp_path, [run, composed]))["throughput"]["data"]
    symbols = next(t["marker"]["symbol"] for t in traces if t["name"] == "zero2")
    assert symbols == ["circle", "circle-open"]


def test_charts_hold_the_measured_figures(tmp_path):
    record = make_record(
        make_plan("zero2"), step_s=2.0, predicted_bytes=300 << 20, peak_allocated_bytes=400 << 20
    )
    missed = make_failure(make_plan("zero2", 8))
    page = page_of(tmp_path, [record, missed])
    figures = figures_of(page)
    assert set(figures) == {"throughput", "memory", "speed", "steps", "space", "timeline"}
    point = next(t for t in figures["memory"]["data"] if t["name"] == "zero2")
    assert (point["x"], point["y"]) == ([300.0], [400.0])
    assert "Median absolute error 25%, worst 25%, over 1 configuration." in page.text
    assert "Predicted to fit and ran out of memory: 1." in page.text
    assert "growth of the process's resident set" in page.text
    assert len(figures["steps"]["data"][0]["x"]) == len(record.step_times_s)


def test_study_where_all_failed_says_so_and_what_to_do(tmp_path):
    records = [make_failure(make_plan(name, 8)) for name in STRATEGIES]
    page = page_of(tmp_path, records, best_yml=None)
    assert "No configuration ran to the end" in page.text
    assert "5 x out of memory: Raise --memory-limit" in page.text
    assert OOM_MESSAGE.replace("134217728 bytes", "128.0 MiB") in page.text
    assert "Fastest configuration" not in page.text and "best.yml" not in page.text
    assert set(figures_of(page)) == {"timeline"}


def test_page_without_a_chart_does_not_carry_the_library(tmp_path):
    page = page_of(tmp_path, [], summary={}, best_yml=None)
    assert figures_of(page) == {}
    assert sum(len(script) for script in page.scripts) < 20_000, "plotly.js without a chart"


def test_unfinished_study_says_so(tmp_path):
    text = page_of(tmp_path, typical_records()[:3], summary={}).text
    assert "Fastest so far: the search has not ended" in text


def test_damaged_lines_are_told(tmp_path):
    folder = write_study(tmp_path)
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"launch": 9, "pla')
    assert "is not a whole record" in parse(render(load_study(folder))).text


def test_terminal_sequences_are_taken_out(tmp_path):
    message = "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x00"
    text = render(
        load_study(write_study(tmp_path, [make_failure(make_plan(), Outcome.CRASHED, message)]))
    )
    assert "\x1b" not in text and "\x00" not in text
    assert "red link" in parse(text).text


@pytest.mark.parametrize(
    "empty",
    [
        {"step_s_low": None, "step_s_high": None},
        {"step_times_s": ()},
        {"predicted_bytes": None, "predicted_step_s": None},
        {"peak_reserved_bytes": None, "peak_allocated_bytes": None},
        {"step_s": None, "measured_accum_steps": ()},
    ],
)
def test_what_was_not_measured_is_left_out(tmp_path, empty):
    page = page_of(tmp_path, [replace(make_record(make_plan()), **empty)], summary={})
    assert "tokens/s" in page.text
    assert "None" not in page.text and "nan" not in page.text


def test_write_leaves_one_file(tmp_path):
    study = load_study(write_study(tmp_path))
    before = set(tmp_path.iterdir())
    write_html(study, tmp_path / "report.html")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report.html"}
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
