"""A headless Chromium that looks at a page, by DevTools' protocol over a pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The browser's program, if there is one on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser.

    Attributes:
      messages: what the console said, errors of the page and requests that were made, as text.
    """

    def __init__(self, to_browser: int, from_browser: int):
        self._to = os.fdopen(to_browser, "wb", buffering=0)
        self._from = os.fdopen(from_browser, "rb")
        self._number, self._session = 0, None
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its result; RuntimeError where it fails."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            content += byte
        message = json.loads(content)
        match message.get("method"):
            case "Runtime.consoleAPICalled" | "Log.entryAdded" | "Runtime.exceptionThrown":
                self.messages.append(json.dumps(message["params"]))
            case "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:", "data:", "about:")):
                    self.messages.append(f"request: {url}")
            case "Page.loadEventFired":
                self._is_loaded = True
        return message

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light", scripts: bool = True):
        """Loads a file in a window of a width and a colour scheme."""
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._is_loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._is_loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of a script in the page; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, file: Path, **clip: float) -> None:
        """The whole page, or a part of it (x, y, width, height), as PNG."""
        options: dict[str, Any] = {"captureBeyondViewport": True}
        if not clip:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        shot = self.call("Page.captureScreenshot", clip={**clip, "scale": 1}, **options)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(program: str) -> Iterator[Browser]:
    """Starts a browser with a profile of its own and ends it."""
    to_child, ours_out = os.pipe()
    ours_in, from_child = os.pipe()
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--remote-debugging-pipe"]

    def connect() -> None:  # DevTools' pipe is file descriptors 3 and 4
        read, write = os.dup(to_child), os.dup(from_child)
        os.dup2(read, 3)
        os.dup2(write, 4)

    process = subprocess.Popen(
        command, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.kill()
        process.wait()
