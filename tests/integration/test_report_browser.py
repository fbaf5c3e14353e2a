"""The page in a real browser: it draws, asks for nothing, and fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from autotune.report.html import write_html
from autotune.report.study import load_study
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import make_failure, make_plan, make_record, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)"
)
DARK = "--blink-settings=preferredColorScheme=0"
# Runs in the page that frames the report, whose window is exactly as wide as the frame.
PROBE = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe id="frame" src="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
frame.onload = () => setTimeout(() => {{
  const view = frame.contentWindow, page = frame.contentDocument;
  {steps}
  const root = page.documentElement;
  found.textContent = JSON.stringify({{
    client: root.clientWidth, scroll: root.scrollWidth,
    drawn: page.querySelectorAll(".chart svg.main-svg").length,
    points: page.querySelectorAll(".chart .point").length,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    rows: [...page.querySelectorAll("#trials tbody tr")].filter((row) => !row.hidden)
      .map((row) => row.cells[0].textContent.trim()),
    shown: page.getElementById("shown")?.textContent,
    sorted: page.querySelector("[aria-sort]")?.textContent.trim(),
    focus: page.activeElement.textContent.trim(),
    tabs: page.querySelectorAll("#trials button, [tabindex='0'], summary, input, select").length,
    ink: view.getComputedStyle(page.body).color,
    chart: page.querySelector(".chart .xtick text")?.style.fill,
    ran: view.hostile || 0,
  }});
}}, 800);
</script>"""


def _chromium(tmp_path: Path, *arguments: str) -> tuple[str, list[str]]:
    """Run the browser; return its standard output and the page's console messages."""
    assert CHROMIUM is not None
    ran = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--virtual-time-budget=10000", *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )  # fmt: skip
    return ran.stdout, [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]


def _look(page: Path, tmp_path: Path, *, width: int = 1280, steps: str = "", flags=()):
    """Open the page from a web server: requests for a file:// address leave no trace."""
    served = tmp_path / "served"
    served.mkdir(exist_ok=True)
    shutil.copy(page, served / "page.html")
    (served / "probe.html").write_text(PROBE.format(page="page.html", width=width, steps=steps))
    with _server(served) as address:
        dom, console = _chromium(tmp_path, *flags, "--dump-dom", f"{address}/probe.html")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)
    assert found and found[1], f"the probe said nothing; console: {console}"
    return json.loads(html.unescape(found[1])), console


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"))
    write_html(load_study(folder), folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("width", [380, 1280])
def test_draws_every_chart_without_a_request_or_a_console_message(report, tmp_path, width):
    found, console = _look(report, tmp_path, width=width)
    assert console == []
    assert found["drawn"] >= 4
    assert found["points"] > 60, "16 configurations in three charts, and the boxes' steps"
    assert found["requests"] == []
    assert found["scroll"] <= found["client"] <= width, "the page itself scrolls sideways"


def test_the_probe_sees_console_messages_requests_and_overflow(tmp_path):
    page = tmp_path / "bad.html"
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.css").write_text("")
    page.write_text(
        "<!doctype html><link rel=stylesheet href=x.css><p style='width:900px'>wide</p>"
        "<script>console.error('planted')</script>"
    )
    found, console = _look(page, tmp_path, width=380)
    assert any("planted" in line for line in console)
    assert len(found["requests"]) == 1
    assert found["scroll"] > found["client"]


def test_dark_and_light_have_their_own_ink(report, tmp_path):
    light, _ = _look(report, tmp_path)
    dark, console = _look(report, tmp_path, flags=[DARK])
    assert console == []
    for found in (light, dark):
        red = {int(re.findall(r"\d+", found[key])[0]) for key in ("ink", "chart")}
        assert max(red) - min(red) < 60, "the charts have the page's ink"
    assert int(re.findall(r"\d+", light["ink"])[0]) < 80
    assert int(re.findall(r"\d+", dark["ink"])[0]) > 180


def test_table_sorts_and_filters_by_keyboard_reachable_controls(report, tmp_path):
    button = "page.querySelectorAll('#trials button')[{}]"
    first, _ = _look(report, tmp_path)
    assert first["rows"][0].startswith("zero2 mbs=4 x ga=8")
    assert first["shown"] == "23 of 23" and first["tabs"] > 15
    steps = button.format(6) + ".focus();" + "page.activeElement.click();" * 2
    by_memory, console = _look(report, tmp_path, steps=steps)
    assert console == []
    assert by_memory["rows"][0].split()[1] == "mbs=1"
    assert by_memory["sorted"].startswith("Reserved") and by_memory["focus"] == "Reserved"
    assert {row.split()[0] for row in by_memory["rows"][-6:]} >= {"zero1", "fsdp2"}
    steps = (
        "const box = page.getElementById('find'); box.value = 'ZERO2  memory';"
        "box.dispatchEvent(new view.Event('input'));"
    )
    filtered, _ = _look(report, tmp_path, steps=steps)
    assert filtered["rows"] == ["zero2 mbs=8 x ga=4"] and filtered["shown"] == "1 of 23"


def test_hostile_study_runs_nothing(tmp_path):
    hostile = "</script><script>window.hostile=1</script><img src=x onerror='window.hostile=2'>"
    plan = make_plan().to_dict() | {"strategy": hostile}
    records = [
        replace(make_record(make_plan()), plan=plan),
        make_record(make_plan("zero3"), step_s=2.1),
        make_failure(make_plan("zero1"), Outcome.CRASHED, hostile),
    ]
    folder = write_study(tmp_path / "study", records, contract={"model": {"name": hostile}})
    write_html(load_study(folder), folder / "report.html")
    found, console = _look(folder / "report.html", tmp_path)
    assert (found["ran"], console, found["requests"]) == (0, [], [])
    assert found["drawn"] >= 4


def test_script_that_slipped_into_the_page_is_stopped_by_its_policy(report, tmp_path):
    page = tmp_path / "slipped.html"
    slipped = "<script>window.hostile=1</script><img src=x onerror='window.hostile=2'></main>"
    page.write_text(report.read_text().replace("</main>", slipped, 1))
    found, console = _look(page, tmp_path)
    assert found["ran"] == 0
    assert any("Content Security Policy" in line for line in console)


def test_prints(report, tmp_path):
    _chromium(tmp_path, DARK, f"--print-to-pdf={tmp_path / 'report.pdf'}", report.as_uri())
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
