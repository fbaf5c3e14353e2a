"""`report.html`: one self-contained page that asks for nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from autotune.report.answer import find_answer
from autotune.report.charts import Chart, build_charts
from autotune.report.page import build_page
from autotune.report.study import Study

_TEMPLATES = files("autotune.report") / "templates"


def write_html(study: Study, path: Path) -> None:
    """Write the page; it appears whole or not at all.

    Every script is in the page, and its content security policy names their hashes and nothing
    else: text of the study that slipped through the escaping would still not run, and no request
    could leave. plotly.js is the one of the installed `plotly` package, about 5 MB.
    """
    text = render(study)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def render(study: Study) -> str:
    """Return the page's text."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    answer = find_answer(study)
    charts = build_charts(study, answer)
    scripts = [_template("report.js")]
    if charts:
        scripts.insert(0, get_plotlyjs())
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_template("report.html.j2")).render(
        page=build_page(study, answer),
        charts=charts,
        figures=Markup(_script_json({chart.key: _figure(chart) for chart in charts})),
        style=Markup(_template("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _figure(chart: Chart) -> dict[str, Any]:
    return {**chart.figure, "height": chart.height}


def _script_json(value: object) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(scripts: list[str]) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
