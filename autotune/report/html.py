"""The pages: self-contained, asking for nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from autotune.report.answer import find_answer
from autotune.report.charts import Chart, build_charts
from autotune.report.files import write_whole
from autotune.report.page import build_page
from autotune.report.study import Study
from autotune.report.table import Table

GENERATOR = "autotune report"
"""In the head of a page: what marks it as ours."""
_TEMPLATES = files("autotune.report") / "templates"


def write_html(study: Study, path: Path) -> None:
    """Write a study's page; it appears whole or not at all."""
    write_whole(path, render(study))


def render(study: Study) -> str:
    """Return the text of a study's page."""
    answer = find_answer(study)
    page = build_page(study, answer)
    tables = [page.trials] if page.trials.rows else []
    return render_page(
        "report.html.j2", charts=build_charts(study, answer), tables=tables, page=page
    )


def render_page(
    template: str,
    *,
    charts: Sequence[Chart],
    tables: Sequence[Table],
    generator: str = GENERATOR,
    **values: Any,
) -> str:
    """Return a page made from a template that extends ``base.html.j2``.

    Every script is in the page, and its content security policy names their hashes and nothing
    else: text of the study that slipped through the escaping would still not run, and no request
    could leave. plotly.js is the one of the installed `plotly` package, about 5 MB; a page without
    a chart does not carry it.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    early, late = [_template("theme.js")], [_template("report.js")]
    library = get_plotlyjs() if charts else ""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        charts=charts,
        figures=Markup(_script_json({chart.key: _figure(chart) for chart in charts})),
        table_data={table.key: Markup(_script_json(table.data())) for table in tables},
        style=Markup(_template("report.css")),
        early_scripts=[Markup(script) for script in early],
        scripts=[Markup(script) for script in late],
        library=Markup(library),
        generator=generator,
        policy=_policy([*early, *late, *filter(None, [library])]),
        **values,
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
