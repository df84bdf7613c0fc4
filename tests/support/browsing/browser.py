"""A real browser without a window, told what to do over pipes in its own protocol (Chrome DevTools')."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.limits import HANG_S

# What is no part of the page under test: nothing of it may reach a network.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)
# A condition is looked at again whenever the browser would draw.
UNTIL = """
new Promise((resolve) => {
  const look = () => {
    let value = null;
    try { value = (%s); } catch {}
    if (value) resolve(value); else setTimeout(look, 20);
  };
  look();
})
"""


class Browser:
    """One browser with one page; a context manager.

    Args:
        program: Path of chromium.
        profile: An empty folder.
        arguments: More of its command line.

    Attributes:
        complaints: What the page has said on its console, what it failed to load or was forbidden, and its errors.
    """

    def __init__(self, program: str, profile: Path, *arguments: str) -> None:
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        # It reads descriptor 3 and writes 4.
        script = f'exec "$@" 3<&{to_read} 4>&{from_write}'
        command = [program, *FLAGS, f"--user-data-dir={profile}", *arguments, "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self._number = 0
        self._received = b""
        self._session = ""
        self._num_loads = 0
        self.complaints: list[str] = []

    def __enter__(self) -> Browser:
        (target,) = [item for item in self._call("Target.getTargets")["targetInfos"] if item["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = ""
        try:
            self._call("Browser.close")
            self._process.wait(HANG_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def open(self, address: str, *, width: int = 1280, height: int = 900) -> None:
        """Goes to a page, in a window of a size in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        for url in ("about:blank", address):
            # From elsewhere, so that another part of the same page is gone to like any other.
            num_loads = self._num_loads
            self._call("Page.navigate", url=url)
            deadline_s = time.monotonic() + HANG_S
            while self._num_loads == num_loads:
                self._note(self._receive(deadline_s, "Page.navigate"))

    def evaluate(self, expression: str) -> Any:
        """What an expression of the page's JavaScript gives; promises are waited for."""
        reply = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def until(self, condition: str) -> Any:
        """Waits until an expression gives something that is true, and returns it."""
        return self.evaluate(UNTIL % condition)

    def enter(self, text: str) -> None:
        """Types into what has the focus, and presses Enter."""
        self._call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13)

    def screenshot(self, path: Path) -> None:
        """Writes what is to be seen, as PNG."""
        import base64

        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + HANG_S
        while True:
            reply = self._receive(deadline_s, method)
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply["error"])
                result: dict[str, Any] = reply["result"]
                return result
            self._note(reply)

    def _receive(self, deadline_s: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"the browser has not answered {method}"
            data = os.read(self._from, 1 << 16)
            assert data, f"the browser has ended at {method}"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        reply: dict[str, Any] = json.loads(message)
        return reply

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._num_loads += 1
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(" ".join(str(item.get("value")) for item in parameters["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case _:
                pass
