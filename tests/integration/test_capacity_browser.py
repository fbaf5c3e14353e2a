"""The capacity page in a real browser: it draws, sorts, asks for nothing, and fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from autotune.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)"
)
DARK = "--blink-settings=preferredColorScheme=0"
# Frames the page: the frame is exactly as wide as asked, which a window is not.
PROBE = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe id="frame" src="page.html" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
frame.onload = () => setTimeout(async () => {{
  const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
  // A chart is drawn when the reader comes near it.
  for (const chart of page.querySelectorAll(".chart")) {{
    chart.scrollIntoView();
    for (let wait = 0; wait < 25 && !chart.querySelector("svg.main-svg"); wait++)
      await new Promise((done) => setTimeout(done, 200));
  }}
  // Virtual time may show the frame too few pictures for all to come near: paper draws the rest.
  if ([...page.querySelectorAll(".chart")].some((chart) => !chart.querySelector("svg.main-svg")))
    for (const moment of ["beforeprint", "afterprint"]) {{
      view.dispatchEvent(new view.Event(moment));
      await new Promise((done) => setTimeout(done, 200));
    }}
  {steps}
  found.textContent = JSON.stringify({{
    client: root.clientWidth, scroll: root.scrollWidth,
    shown: page.getElementById("cells-shown").textContent.trim(),
    drawn: page.querySelectorAll(".chart svg.main-svg").length,
    points: page.querySelectorAll(".chart .point").length,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    rows: [...page.querySelectorAll("#cells tbody tr")].map((row) =>
      [...row.cells].map((cell) => cell.textContent.trim())),
    sorted: page.querySelector("[aria-sort]")?.textContent.trim(),
    ink: view.getComputedStyle(page.body).color,
    chart: page.querySelector(".chart .xtick text")?.style.fill,
    line: page.querySelector(".chart .js-line")?.style.stroke,
    title: page.getElementById("answer-title").textContent.trim(),
    hostile: view.hostile || 0,
  }});
}}, 300);
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A web server: requests for a file:// address leave no trace. Two types, five counts."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "capacity", "--model", "qwen3-8b", "--gpu-type", "h100-sxm,l40s", "--gpus",
                "1,4,8,12,16", "--tokens", "10B", "--price", "h100-sxm=2.5,l40s=0.9", "--power",
                "--html", str(folder / "page.html"),
            ]
        )  # fmt: skip
    assert caught.value.code == 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def look(served, tmp_path):
    folder, address = served

    def looked(*, width=1280, steps="", flags=()):
        (folder / "probe.html").write_text(PROBE.format(width=width, steps=steps))
        ran = subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
                "--virtual-time-budget=40000", *flags, "--dump-dom", f"{address}/probe.html",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.S)
        console = [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
        assert found and found[1], f"the probe said nothing; console: {console}"
        return json.loads(html.unescape(found[1])), console

    return looked


@pytest.mark.parametrize(("width", "clicks"), [(1280, 1), (380, 2)])
def test_draws_sorts_and_fits_without_a_request_or_a_console_message(look, width, clicks):
    tokens = "page.querySelectorAll('#cells button')[3].click();"
    found, console = look(width=width, steps=tokens * clicks)
    assert (console, found["requests"]) == ([], [])
    assert found["drawn"] >= 2
    assert len(found["rows"]) == 10
    assert found["points"] == 2 * 8, "every cell that runs is in both charts"
    assert found["scroll"] <= found["client"] <= width, "the page itself scrolls sideways"
    assert re.fullmatch(r"\d+ x (h100-sxm|l40s)", found["title"])
    # Sorted by number, largest first, the other way on the second click; no figure stays last.
    values = [row[3] for row in found["rows"]]
    figures = [float(text.replace(",", "")) for text in values[:-2]]
    assert found["sorted"].startswith("Tokens/s") and set(values[-2:]) == {"\N{EM DASH}"}
    assert figures == sorted(figures, reverse=clicks == 1) and len(set(figures)) == 8


def test_the_table_is_filtered_by_words_and_by_what_fits(look):
    type_in = (
        "const find = page.getElementById('cells-find'); find.value = 'l40s zero3';"
        "find.dispatchEvent(new view.Event('input'));"
    )
    found, console = look(steps=type_in)
    assert console == []
    assert 0 < len(found["rows"]) < 10
    assert all("l40s" in row[0] and "zero3" in " ".join(row) for row in found["rows"])
    assert found["shown"] == f"{len(found['rows'])} of 10 shown"
    choose = (
        "const fits = page.getElementById('cells-fits'); fits.value = 'refused';"
        "fits.dispatchEvent(new view.Event('change'));"
    )
    found, _ = look(steps=choose)
    assert [row[:2] for row in found["rows"]] == [["h100-sxm", "12"], ["l40s", "12"]]
    assert found["shown"] == "2 of 10 shown"


def test_dark_and_light_have_their_own_ink(look):
    light, _ = look()
    dark, console = look(flags=[DARK])
    assert console == [] and light["line"] != dark["line"]
    for found in (light, dark):
        red = {int(re.findall(r"\d+", found[key])[0]) for key in ("ink", "chart")}
        assert max(red) - min(red) < 60, "the charts have the page's ink"
    assert int(re.findall(r"\d+", light["ink"])[0]) < 80
    assert int(re.findall(r"\d+", dark["ink"])[0]) > 180


def test_script_that_slipped_into_the_page_is_stopped_by_its_policy(served, look):
    page = served[0] / "page.html"
    whole = page.read_text()
    page.write_text(whole.replace("</main>", "<script>window.hostile=1</script></main>", 1))
    try:
        found, console = look()
    finally:
        page.write_text(whole)
    assert found["hostile"] == 0
    assert any("Content Security Policy" in line for line in console)
