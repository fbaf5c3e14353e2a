"""The pages' colours: text can be read, and charts can be told from the ground, in both themes."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

CSS = (files("autotune.report") / "templates" / "report.css").read_text()
TOKENS = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", CSS))
THEMES = ["light", "dark"]


def colour(token, theme):
    return TOKENS[token].split(", ")[THEMES.index(theme)]


def luminance(colour):
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Contrast ratio, WCAG 2.2: 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def mixed(one, other, share):
    """What color-mix in sRGB gives."""
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def test_every_token_has_both_themes():
    used = set(re.findall(r"var\(--(\w+)\)", CSS))
    assert used <= set(TOKENS)
    assert {f"s{index}" for index in range(8)} <= set(TOKENS)


def test_the_ruler_is_the_published_one():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("ink", ["fg", "muted", "accent", "bad"])
@pytest.mark.parametrize("ground", ["bg", "panel"])
def test_text_can_be_read(theme, ink, ground):
    assert contrast(colour(ink, theme), colour(ground, theme)) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("ink", ["fg", "accent"])
def test_text_of_the_answers_row_can_be_read(theme, ink):
    assert "color-mix(in srgb, var(--accent) 10%, var(--panel))" in CSS
    ground = mixed(colour("accent", theme), colour("panel", theme), 0.1)
    assert contrast(colour(ink, theme), ground) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("series", [f"s{index}" for index in range(8)])
def test_marks_stand_out_from_the_ground(theme, series):
    assert contrast(colour(series, theme), colour("bg", theme)) >= 3.0
