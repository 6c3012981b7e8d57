"""Headless Chromium, driven through its DevTools protocol with the standard library alone.

``python -m tests.browser runs/tiny/report.html docs/pairs.png`` makes the README's picture of the pairs.
"""

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_LIMIT = 60  # seconds that anything may take


class Page:
    """A tab that shows a file. Anything that goes to the console as an error is noted in ``errors``.

    Args:
        file: to open.
        profile: a folder for what Chromium keeps.
        width, height: of the window, in CSS pixels.
        dark: which theme the system asks for.
    """

    def __init__(self, file: Path, profile: Path, width: int = 1280, height: int = 900, dark: bool = False):
        assert CHROMIUM is not None
        self.errors: list[str] = []
        self._asked = 0
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"),
                *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._socket = _connect(_debugger(profile / "DevToolsActivePort"))
            self._open(file, width, height, dark)
        except BaseException:
            self._process.kill()
            raise

    def resize(self, width: int, height: int) -> None:
        """Another window; a narrow one is a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )

    def theme(self, dark: bool) -> None:
        """Which one the system asks for."""
        wanted = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[wanted])

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """One after another: "j", "Enter", "ArrowDown"."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path: Path, selector: str) -> None:
        """The part of the page that ``selector`` names, as a PNG."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        place = self.value(f"(({{x, y, width, height}}) => ({{x, y: y + scrollY, width, height}}))({box})")
        picture = self.call("Page.captureScreenshot", clip=place | {"scale": 1}, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol."""
        self._asked += 1
        _send(self._socket, json.dumps({"id": self._asked, "method": method, "params": parameters}))
        while True:
            message = json.loads(_receive(self._socket))
            if message.get("id") == self._asked:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _open(self, file: Path, width: int, height: int, dark: bool) -> None:
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.resize(width, height)
        self.theme(dark)
        self.call("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + _LIMIT
        while not self.value("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.05)

    def _note(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
            self.errors.append(str(about["args"]))
        elif message.get("method") == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(_LIMIT)


def _debugger(port_file: Path) -> str:
    """The address of the first tab's WebSocket."""
    deadline = time.monotonic() + _LIMIT
    while True:
        assert time.monotonic() < deadline, "Chromium does not start"
        time.sleep(0.05)
        if not port_file.is_file() or not port_file.read_text():
            continue
        with urllib.request.urlopen(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/list") as answer:
            tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
        if tabs:
            return str(tabs[0]["webSocketDebuggerUrl"])


def _connect(address: str) -> socket.socket:
    found = re.fullmatch(r"ws://([^:/]+):(\d+)(/.*)", address)
    assert found, address
    connection = socket.create_connection((found[1], int(found[2])), timeout=_LIMIT)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = (
        *(f"GET {found[3]} HTTP/1.1", f"Host: {found[1]}:{found[2]}", "Upgrade: websocket", "Connection: Upgrade"),
        *(f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""),
    )
    connection.sendall("\r\n".join(lines).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return connection


def _send(connection: socket.socket, text: str) -> None:
    """One masked text frame; a mask of zeros leaves the payload as it is."""
    payload = text.encode()
    assert len(payload) < 1 << 16
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack(">H", len(payload))
    connection.sendall(b"\x81" + length + bytes(4) + payload)


def _receive(connection: socket.socket) -> bytes:
    """The payload of one message, maybe of several frames."""
    message = b""
    while True:
        first, second = _exactly(connection, 2)
        length = second & 0x7F
        if length >= 126:
            size, form = (2, ">H") if length == 126 else (8, ">Q")
            (length,) = struct.unpack(form, _exactly(connection, size))
        message += _exactly(connection, length)
        if first & 0x80:
            return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        part = connection.recv(count - len(found))
        assert part, "Chromium has closed the connection"
        found += part
    return bytes(found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Page(Path(sys.argv[1]), Path(folder)) as opened:
        opened.press("s", "j")
        opened.screenshot(Path(sys.argv[2]), "#browser")
