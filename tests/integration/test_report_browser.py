"""The pages in a real browser: they draw, sort, filter, ask for nothing, and fit a phone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from autotune.report.compare import compare
from autotune.report.compare_page import write_comparison
from autotune.report.html import write_html
from autotune.report.study import load_study
from autotune.report.table import PAGE_ROWS
from autotune.trial.protocol import Outcome
from benchmarks.chromium import EXECUTABLE, chromium_page
from benchmarks.report_speed import made_up_records
from tests.unit.report_studies import (
    make_failure,
    make_plan,
    make_record,
    typical_records,
    write_study,
)

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no chromium here (Debian: apt-get install chromium)"
)
CHARTS = {"throughput", "memory", "speed", "steps", "space", "timeline"}
# Of every chart: the marks, boxes and lines in it.
DRAWN = """Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [
  chart.id.replace("chart-", ""),
  chart.querySelectorAll(".main-svg .point, .main-svg .js-line, .main-svg path.box").length,
]))"""
SCROLL_THROUGH = """(async () => {
  for (const chart of document.querySelectorAll(".chart")) {
    chart.scrollIntoView({block: "center"});
    await new Promise((done) => setTimeout(done, 150));
  }
})()"""
NAMES = "[...document.querySelectorAll('#trials tbody th')].map((cell) => cell.textContent.trim())"
SHOWN = "document.getElementById('trials-shown').textContent"
SORTED = "document.querySelector('#trials [aria-sort]')?.textContent"
FOCUS = "document.activeElement.id || document.activeElement.textContent.trim()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser):
    browser.reset()
    return browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"))
    write_html(load_study(folder), folder / "report.html")
    return (folder / "report.html").as_uri()


def _clean(page):
    """No message on the console, no request to anywhere, nothing wider than the window."""
    widths = page.run("[document.documentElement.scrollWidth, innerWidth]")
    return page.console == [] and page.requests == [] and widths[0] <= widths[1]


@pytest.mark.parametrize("width", [360, 1280])
def test_draws_every_chart_without_a_request_or_a_console_message(report, page, width):
    page.window(width)
    page.go(report)
    page.run(SCROLL_THROUGH)
    page.settle()
    drawn = page.run(DRAWN)
    assert set(drawn) == CHARTS
    # 16 configurations that ran, and 8 steps of 12 of them; 16 + 6 lines; 6 + 16 trials.
    assert drawn["throughput"] >= 16 and drawn["memory"] >= 16 and drawn["speed"] >= 16
    assert drawn["steps"] >= 12 * 8 and drawn["space"] >= 7 and drawn["timeline"] >= 22
    assert _clean(page), (page.console, page.requests)


def test_the_page_sees_console_messages_requests_and_overflow(tmp_path, page):
    (tmp_path / "x.css").write_text("")
    (tmp_path / "bad.html").write_text(
        "<!doctype html><link rel=stylesheet href=x.css><p style='width:1900px'>wide</p>"
        "<script>console.error('planted'); fetch('http://127.0.0.1:9/').catch(() => 0);"
        "setTimeout(() => { throw new Error('thrown') })</script>"
    )
    page.go((tmp_path / "bad.html").as_uri())
    assert any("planted" in line for line in page.console)
    assert any("thrown" in line for line in page.console)
    assert {address.rsplit("/", 1)[-1] for address in page.requests} == {"x.css", ""}
    assert page.run("document.documentElement.scrollWidth > innerWidth")


def _brightness(page, selector, style="color"):
    colour = page.run(f"getComputedStyle(document.querySelector('{selector}')).{style}")
    return int(re.findall(r"\d+", colour)[0])


def test_theme_follows_the_system_and_a_choice_is_remembered(report, page):
    page.prefer("dark")
    page.go(report)
    assert _brightness(page, "body") > 180, "light ink"
    page.prefer("light")
    page.settle()
    assert _brightness(page, "body") < 80
    axis = ".chart .xtick text"
    assert _brightness(page, axis, "fill") < 80
    page.run("document.getElementById('theme').focus()")
    page.run(
        "(() => { const box = document.getElementById('theme'); box.value = 'dark';"
        "box.dispatchEvent(new Event('change')); })()"
    )
    page.settle()
    assert _brightness(page, "body") > 180 and _brightness(page, axis, "fill") > 180
    page.go(report)
    assert _brightness(page, "body") > 180, "remembered"
    assert page.run("document.getElementById('theme').value") == "dark"
    assert _clean(page), page.console
    page.run("localStorage.clear()")


def test_table_sorts_by_click_and_by_key(report, page):
    page.go(report)
    assert page.run(NAMES)[1] == "zero2 mbs=4 x ga=8 answer"
    assert page.run(SORTED) == "Tokens/s" and page.run(SHOWN) == "26 shown"
    page.click("#trials th:nth-child(8) button")  # reserved memory, largest first
    assert page.run(SORTED) == "Reserved"
    largest = page.run(NAMES)
    page.press("Enter")
    smallest = page.run(NAMES)
    assert page.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == (
        "ascending"
    )
    assert page.run(FOCUS) == "Reserved", "the focus stays where it was"
    assert largest[0].split()[1] == "mbs=4" and smallest[0].split()[1] == "mbs=1"
    # Nine trials have no measured memory: last in both directions.
    assert set(largest[-9:]) == set(smallest[-9:])
    page.press("Tab")
    page.press(" ")
    assert page.run(SORTED) == "Allocated", "the next column, by Tab and Space"
    assert _clean(page), page.console


def test_table_filters_by_text_outcome_and_strategy(report, page):
    page.go(report)
    page.click("#trials-find")
    page.type("ZERO2  memory")
    assert page.run(NAMES) == ["zero2 mbs=8 x ga=4"] and page.run(SHOWN) == "1 of 26 shown"
    page.run("document.getElementById('trials-find').value = ''")
    for name, value in (("outcome", "out of memory"), ("strategy", "fsdp2")):
        page.run(
            f"(() => {{ const box = document.getElementById('trials-{name}');"
            f"box.value = '{value}'; box.dispatchEvent(new Event('change')); }})()"
        )
    assert page.run(NAMES) == ["fsdp2 mbs=8 x ga=4"]
    assert page.run("document.querySelector('#trials tbody tr').className") == "failed"


def test_everything_is_reached_by_keyboard_and_has_a_name(report, page):
    page.go(report)
    page.press("Tab")
    assert page.run(FOCUS) == "Skip to the answer"
    page.press("Enter")
    assert page.run(FOCUS) == "main"
    unnamed = page.run(
        "[...document.querySelectorAll('input, select, button, [role=region], [role=img]')].filter("
        "(e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label') ||"
        " document.getElementById(e.getAttribute('aria-labelledby')))).length"
    )
    assert unnamed == 0
    assert page.run("document.querySelectorAll('thead th:not([scope=col])').length") == 0


def test_thousands_of_trials_are_paged_sorted_and_filtered_as_a_whole(tmp_path, page):
    records = list(made_up_records(1200))
    folder = write_study(tmp_path / "study", records, best_yml=None)
    write_html(load_study(folder), folder / "report.html")
    page.go((folder / "report.html").as_uri())
    assert page.run(SHOWN) == f"1 to {PAGE_ROWS} of 1,203"
    assert len(page.run(NAMES)) == PAGE_ROWS
    first = page.run(NAMES)
    page.click(".pager button:last-child")
    assert page.run(SHOWN) == f"{PAGE_ROWS + 1} to {2 * PAGE_ROWS} of 1,203"
    page.click(".pager button:first-child")
    assert page.run(NAMES) == first
    page.click("#trials th:nth-child(3) button")
    slowest = min((r for r in records if r.tokens_per_s), key=lambda r: r.tokens_per_s or 0.0)
    cell = page.run("document.querySelector('#trials tbody td.num').textContent")
    assert cell.rstrip("*") == f"{slowest.tokens_per_s:,.0f}"
    page.click("#trials-find")
    page.type("zero1 out of memory")
    found = sum(r.outcome is Outcome.OOM and r.plan["strategy"] == "zero1" for r in records)
    assert page.run(SHOWN) == f"{found} of 1,203 shown" and len(page.run(NAMES)) == found
    assert page.run("document.querySelector('.pager').hidden")
    assert _clean(page), page.console


def test_comparison_draws_and_sorts(tmp_path, page):
    first = write_study(tmp_path / "a")
    faster = [
        replace(r, tokens_per_s=r.tokens_per_s * 1.1) if r.tokens_per_s else r
        for r in typical_records()
    ]
    second = write_study(tmp_path / "b", faster, contract={"model": {"name": "other"}})
    write_comparison(compare(load_study(first), load_study(second)), tmp_path / "page.html")
    page.go((tmp_path / "page.html").as_uri())
    page.run(SCROLL_THROUGH)
    assert page.run(DRAWN)["pairs"] >= 16
    assert "Not the same work" in page.run("document.querySelector('h1').textContent")
    ratios = (
        "[...document.querySelectorAll('#pairs tbody td:nth-child(4)')].map(c => c.textContent)"
    )
    page.click("#pairs th:nth-child(4) button")
    assert page.run(ratios)[0] == "1.100" and page.run(ratios)[-1] == "\N{EM DASH}"
    assert _clean(page), page.console


def test_hostile_study_runs_nothing(tmp_path, page):
    hostile = "</script><script>window.hostile=1</script><img src=x onerror='window.hostile=2'>"
    plan = make_plan().to_dict() | {"strategy": hostile}
    records = [
        replace(make_record(make_plan()), plan=plan),
        make_record(make_plan("zero3"), step_s=2.1),
        make_failure(make_plan("zero1"), Outcome.CRASHED, hostile),
    ]
    folder = write_study(tmp_path / "study", records, contract={"model": {"name": hostile}})
    write_html(load_study(folder), folder / "report.html")
    page.go((folder / "report.html").as_uri())
    page.run(SCROLL_THROUGH)
    page.click("#trials th:nth-child(1) button")
    assert page.run("window.hostile || 0") == 0
    assert _clean(page), (page.console, page.requests)
    assert all(page.run(DRAWN).values())


def test_script_that_slipped_into_the_page_is_stopped_by_its_policy(report, tmp_path, page):
    slipped = "<script>window.hostile=1</script><img src=x onerror='window.hostile=2'></main>"
    text = _read(report).replace("</main>", slipped, 1)
    (tmp_path / "slipped.html").write_text(text)
    page.go((tmp_path / "slipped.html").as_uri())
    assert page.run("window.hostile || 0") == 0
    assert any("Content Security Policy" in line for line in page.console)


def _read(address):
    from urllib.request import url2pathname

    with open(url2pathname(address.removeprefix("file://"))) as file:
        return file.read()


def test_prints_every_chart_on_white_without_controls(report, tmp_path, page):
    page.prefer("dark")
    page.go(report)
    # After the page's own listener, which was there first.
    page.run(
        "addEventListener('beforeprint', () => { window.printed = {"
        "ink: getComputedStyle(document.body).color,"
        "charts: document.querySelectorAll('.chart svg.main-svg').length,"
        "rows: document.querySelectorAll('#trials tbody tr').length}; })"
    )
    page.run(
        "matchMedia('print').addEventListener('change', (e) => { if (e.matches) window.controls ="
        "getComputedStyle(document.querySelector('.controls label')).display; })"
    )
    page.pdf(tmp_path / "report.pdf")
    printed = page.run("window.printed")
    assert printed["charts"] >= len(CHARTS) and printed["rows"] == 26
    assert int(re.findall(r"\d+", printed["ink"])[0]) < 80, "dark ink, though the screen is dark"
    assert page.run("window.controls") == "none"
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    assert _brightness(page, "body") > 180, "dark again after printing"
