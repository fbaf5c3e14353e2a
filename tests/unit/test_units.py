"""Sizes as a person reads them."""

from __future__ import annotations

import pytest

from autotune.units import format_bytes


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
