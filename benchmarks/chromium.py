"""A headless Chromium for the report's tests and measurements, spoken to over its own pipe.

The DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) goes over two file
descriptors with ``--remote-debugging-pipe``: no driver and no package are needed. Clicks and keys
go through the browser's input, as a person's would; every request is seen, also those of a page
opened from disk.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"Enter": ("\r", 13), " ": (" ", 32), "Tab": ("", 9)}


class Page:
    """One tab: where it went, what it asked for, what it said on its console."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int):
        self._process = process
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self._loaded = False
        self.requests: list[str] = []
        """Everything fetched, beside the page itself and data: addresses."""
        self.console: list[str] = []
        """Console messages, uncaught exceptions, and what the browser itself complains about."""
        self.version = str(self._call("Browser.getVersion")["product"])
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def reset(self) -> None:
        """Leave the page; forget what was seen; a light system and a wide window again."""
        self.go("about:blank")
        self.requests.clear()
        self.console.clear()
        self.prefer("light")
        self.window(1280)

    def window(self, width: int, height: int = 900) -> None:
        """Set the window's size in pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """Tell the page that the system is ``light`` or ``dark``."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def go(self, address: str, timeout_s: float = 60.0) -> None:
        """Open an address and wait for its load event and the next frame."""
        self._loaded = False
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + timeout_s
        while not self._loaded:
            self._read(deadline)
        self.settle()

    def settle(self) -> None:
        """Wait until what the page began has been drawn."""
        frame = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))"
        self.run(f"{frame}.then(() => {frame})")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, a promise's once it is there."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Click the middle of the first element that matches."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', inline: 'center'});"
            "const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key of `_KEYS` where the focus is."""
        text, code = _KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)
        self.settle()

    def type(self, text: str) -> None:
        """Type text where the focus is."""
        self._call("Input.insertText", text=text)
        self.settle()

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        shot = self._call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )  # fmt: skip
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page, A4."""
        printed = self._call(
            "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69
        )
        path.write_bytes(base64.b64decode(printed["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self._call("Browser.close")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60.0
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def _read(self, deadline: float) -> dict[str, Any]:
        """Return the next message; events are noted on the way."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], deadline - time.monotonic())
            chunk = os.read(self._from, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError("the browser did not answer")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            address = details["request"]["url"]
            is_page = (
                details.get("type") == "Document" and details["loaderId"] == details["requestId"]
            )
            if not is_page and not address.startswith("data:"):
                self.requests.append(address)
        elif event == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(a.get("value", a)) for a in details["args"]))
        elif event == "Runtime.exceptionThrown":
            self.console.append(str(details["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.console.append(details["entry"]["text"])


@contextmanager
def chromium_page(profile: Path) -> Iterator[Page]:
    """Start a browser with a profile folder of its own and give its one tab."""
    assert EXECUTABLE is not None, "no chromium here"
    to_browser, from_browser = os.pipe(), os.pipe()

    def connect() -> None:
        # The browser reads 3 and writes 4; by way of numbers that cannot be either.
        ends = os.dup2(to_browser[0], 63), os.dup2(from_browser[1], 64)
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=connect,
        pass_fds=(3, 4),
        start_new_session=True,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        page = Page(process, to_browser[1], from_browser[0])
        yield page
        page.close()
        process.wait(timeout=20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
