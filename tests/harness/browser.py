"""A real Chromium, driven over the DevTools protocol by a pipe: no library, no port, no network."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYS = {"Enter": 13, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
        "ArrowRight": 39, "ArrowDown": 40, "/": 191}  # fmt: skip
DEADLINE_S = 30


def chromium() -> str | None:
    """Where the browser is, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab. Everything thrown or logged as an error by the page is in `errors`, everything it asked to load in `loads`."""

    def __init__(self, reading: int, writing: int) -> None:
        self._in, self._out, self._number, self._rest = reading, writing, 0, b""
        self.errors: list[str] = []
        self.loads: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    _session: str | None = None

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser is gone"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        found = json.loads(message)
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["params"]["exceptionDetails"])[:500])
        if found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
            self.errors.append(found["params"]["entry"]["text"])
        if found.get("method") == "Network.requestWillBeSent":
            self.loads.append(found["params"]["request"]["url"])
        return found

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file and wait until its script has run."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=path.as_uri() + fragment)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + DEADLINE_S
        while not self.run(condition):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        named = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, 0), **({"text": key} if len(key) == 1 else {})}
        if key == "Enter":
            named["text"] = "\r"
        self._call("Input.dispatchKeyEvent", type="keyDown", **named)
        self._call("Input.dispatchKeyEvent", type="keyUp", **named)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self._call("Input.insertText", text=text)

    def look(self, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, and the colour scheme."""
        mobile = width < 500
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if mobile else 1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A picture of what is seen, or of the whole page."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A headless browser with a profile folder of its own; gone at the end."""
    ours, theirs = os.pipe(), os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs[0], ours[1])]
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"
    line = f'exec "$0" {flags} --user-data-dir="$1" --remote-debugging-pipe 3<&{high[0]} 4>&{high[1]}'
    process = subprocess.Popen(
        ["bash", "-c", line, chromium(), profile], pass_fds=high, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    for fd in (*high, theirs[0], ours[1]):
        os.close(fd)
    try:
        yield Page(ours[0], theirs[1])
    finally:
        process.terminate()
        process.wait(10)
        os.close(ours[0])
        os.close(theirs[1])
