"""Sizes as a person reads them."""

from __future__ import annotations

import pytest

from autotune.errors import AutotuneError
from autotune.units import format_bytes, parse_bytes, parse_count, parse_duration_s


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.0 MiB"),
        (10, "10 bytes"),
        (50_000, "50,000 bytes"),
        (-50_000, "-50,000 bytes"),
        (60_000, "0.1 MiB"),
        (2**20, "1.0 MiB"),
        (1023 * 2**20, "1023.0 MiB"),
        (2**30, "1.00 GiB"),
    ],
)
def test_no_size_but_zero_reads_as_zero(num_bytes, text):
    """`--memory-limit 10` means 10 bytes; a message that it is 0.0 MiB hides the mistake."""
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [(parse_count, "1.5T", 1.5e12), (parse_bytes, "2TB", 2e12), (parse_duration_s, "2d", 172800)],
)
def test_what_no_number_holds_is_refused(parse, text, value):
    """300 digits are a number, and times a million million they are none."""
    assert parse(text) == value
    with pytest.raises(AutotuneError, match="is not a"):
        parse("9" * 308 + text.lstrip("1.5"))
