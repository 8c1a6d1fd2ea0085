"""A headless Chromium, driven by its own DevTools protocol over a websocket: no driver, no other package."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado.ioloop import IOLoop
from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-port=0"),
)
_SECONDS = 30.0
# Bokeh draws into shadow trees, which no selector passes.
_FIND = """
(function find(root, selector) {
    const found = root.querySelector(selector)
    if (found) return found
    for (const one of root.querySelectorAll("*")) {
        const inside = one.shadowRoot && find(one.shadowRoot, selector)
        if (inside) return inside
    }
    return null
})
"""


class Tab:
    """One page.

    Attributes:
        errors: what the console said of errors, what was thrown, and what could not be loaded.
        hosts: that anything was asked of.
    """

    def __init__(self, loop: IOLoop, socket: WebSocketClientConnection) -> None:
        self._loop, self._socket, self._number = loop, socket, 0
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; events that come meanwhile are noted."""
        self._number += 1
        number = self._number
        self._loop.run_sync(
            lambda: self._socket.write_message(
                json.dumps({"id": number, "method": method, "params": params})
            ),
            timeout=_SECONDS,
        )
        while True:
            text = self._loop.run_sync(self._socket.read_message, timeout=_SECONDS)
            assert text is not None, "Chromium has gone"
            message = json.loads(text)
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                result: dict[str, Any] = message["result"]
                return result
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent" and params["request"]["url"].startswith("http"):
            self.hosts.add(params["request"]["url"].split("/")[2])
        elif method == "Network.webSocketCreated":
            self.hosts.add(params["url"].split("/")[2])

    def open(self, url: str) -> None:
        """Go to a page."""
        self.send("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of a script."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self, selector: str) -> str | None:
        """The text of the first element, in whatever shadow tree; None where there is none."""
        return self.evaluate(f"{_FIND}(document, {json.dumps(selector)})?.textContent ?? null")  # type: ignore[no-any-return]

    def until(self, true: Callable[[], Any], seconds: float = _SECONDS) -> Any:
        """What it gives once that is true."""
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, self.errors
            time.sleep(0.1)
        return found

    def picture(self, path: str | Path) -> None:
        """Write what is seen as PNG."""
        shot = self.send("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing(width: int = 1400, height: int = 1000) -> Iterator[Tab]:
    """A tab of a Chromium with nothing in its profile; it is gone when the block is left."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen([*command, "about:blank"], stderr=subprocess.DEVNULL)
        loop = IOLoop(make_current=False)
        try:
            socket = loop.run_sync(
                lambda: websocket_connect(_address(process, Path(profile)), max_message_size=2**27),
                timeout=_SECONDS,
            )
            tab = Tab(loop, socket)
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            tab.send("Emulation.setDeviceMetricsOverride", **size)
            yield tab
            loop.run_sync(lambda: _closed(socket))
        finally:
            loop.close()
            process.terminate()
            process.wait(_SECONDS)


async def _closed(socket: WebSocketClientConnection) -> None:
    """Say goodbye, in the loop: a thread whose loop another test has ended has none to write with."""
    socket.close()


def _address(process: subprocess.Popen[bytes], profile: Path) -> str:
    port = profile / "DevToolsActivePort"
    end = time.monotonic() + _SECONDS
    while not (port.exists() and port.read_text().count("\n")):
        assert process.poll() is None, "Chromium does not start"
        assert time.monotonic() < end
        time.sleep(0.05)
    with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list") as answer:
        found: str = next(one for one in json.load(answer) if one["type"] == "page")["webSocketDebuggerUrl"]
    return found
