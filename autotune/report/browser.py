"""Show a page to the person at the terminal, where there is a browser to show it in."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path


def open_page(path: Path) -> str:
    """Open a page in the browser; return a sentence on what happened, never fail.

    Without a display only ``$BROWSER`` is tried: Python's own search would then find a text browser
    such as lynx, which takes the terminal and cannot draw the charts.
    """
    address = path.resolve().as_uri()
    if not _has_display() and not os.environ.get("BROWSER"):
        return (
            f"No display here to open a browser on. Copy {path} to a machine with one, or open "
            f"{address} where this disk is mounted; the page is one file and needs no network."
        )
    try:
        opened = webbrowser.open(address)
    except webbrowser.Error:
        opened = False
    if opened:
        return f"Opened {address}"
    return f"No browser could be started. Open {address} yourself, or name one in $BROWSER."


def _has_display() -> bool:
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
