"""The page of a run in headless Chromium: whole and readable, at any width, in both schemes.

For who changes the page: it needs a browser (`apt-get install chromium`) and axe, which looks for
what keeps people from reading it (`npm install --no-save axe-core` in the checkout).
What one should look at is in pytest's temporary folders, page.png of each test.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import flaxcls

ROOT = Path(__file__).parent.parent
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
SECONDS = 120  # after which a browser is ended that does not answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="there is no Chromium"),
    pytest.mark.skipif(not AXE.exists(), reason="there is no axe-core"),
]


class Browser:
    """One page of a browser.

    Attributes:
      messages: what the console said, errors of the page and requests that were made, as text.
    """

    def __init__(self, to_browser: BinaryIO, from_browser: BinaryIO):
        self._to, self._from = to_browser, from_browser
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
def started() -> Iterator[Browser]:
    """A browser with a profile of its own; it is ended afterwards."""
    to_child, ours_out = os.pipe()
    ours_in, from_child = os.pipe()
    command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
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
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    try:
        with os.fdopen(ours_out, "wb", buffering=0) as out, os.fdopen(ours_in, "rb") as answers:
            yield Browser(out, answers)
    finally:
        timer.cancel()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(digits_run, tmp_path_factory):
    """The page of a run, and one that compares two."""
    folder = tmp_path_factory.mktemp("pages")
    return {
        "run": flaxcls.write_report([digits_run], folder / "run.html"),
        "runs": flaxcls.write_report([digits_run, digits_run], folder / "runs.html"),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("page", ["run", "runs"])
def test_page_has_no_errors_and_fits(browser, pages, page, width, scheme, tmp_path):
    browser.open(pages[page], width=width, scheme=scheme)
    browser.screenshot(tmp_path / "page.png")  # stays for some runs of the tests
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run(AXE.read_text() + "; 0")
    found = browser.run("axe.run()")
    assert len(found["passes"]) > 20
    assert [(each["impact"], each["id"]) for each in found["violations"]] == []
    assert browser.messages == []


def test_table_sorts_by_its_buttons(browser, pages):
    browser.open(pages["run"])
    recalls = """[...document.querySelectorAll("#classes tbody tr")]
        .map(row => parseFloat(row.cells[2].dataset.value))"""
    click = "document.querySelectorAll('#classes th button')[2].click()"
    before = browser.run(recalls)
    assert before == sorted(before) and len({*before}) > 1
    for turn in (sorted(before), sorted(before, reverse=True)):
        browser.run(click)
        assert browser.run(recalls) == turn
    names = "[...document.querySelectorAll('#classes tbody th')].map(cell => cell.textContent)"
    browser.run("document.querySelector('#classes th button').click()")
    assert browser.run(names) == [str(number) for number in range(10)]
    sort = browser.run("document.querySelector('#classes th').getAttribute('aria-sort')")
    assert sort == "ascending"


def test_page_is_whole_without_scripts(browser, pages):
    browser.open(pages["run"], scripts=False)
    root = browser.call("DOM.getDocument")["root"]["nodeId"]

    def count(selector: str) -> int:
        return len(browser.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])

    assert count("#classes tbody tr") == 10 and count("button") == 0 and count("svg") > 5
