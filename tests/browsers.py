"""A real browser without a window, driven by the DevTools protocol over two pipes; needs nothing but Chromium.

with Browser(path, profile) as browser:
    page = browser.open(file.as_uri())
    page.evaluate("document.title")
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: What a Chromium may be called; `JAXAUDIT_BROWSER` names another.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
NAMES += ("google-chrome-stable", "chrome", "microsoft-edge")

_SECONDS = 60.0  # for an answer; a machine at work on all cores starts a browser slowly
_OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find_browser() -> str | None:
    """Return the path of a browser of the Chromium family, if there is one."""
    given = os.environ.get("JAXAUDIT_BROWSER")
    return next(filter(None, map(shutil.which, [given] if given else NAMES)), None)


class Browser:
    """A browser that can reach nothing but files."""

    def __init__(self, path: str, profile: Path):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The protocol fixes the descriptors: the browser reads 3 and writes 4. A shell puts them there.
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [path, *_OPTIONS, *root, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec 5<&{to_browser} 6>&{from_browser} 3<&5 4>&6 5<&- 6>&-; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            self.ask("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Call a method of the protocol; what the browser tells meanwhile goes to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        view = memoryview(json.dumps(message).encode() + b"\0")
        while view:
            view = view[os.write(self._out, view) :]
        while True:
            told = self._next()
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def wait_for(self, event: str) -> None:
        """Wait for an event that has not been told of yet."""
        while not any(told.get("method") == event for told in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise EOFError("the browser ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> "Page":
        """Open a page and wait until all of it is there."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        self.events.clear()
        self.ask("Page.navigate", session, url=address)
        self.wait_for("Page.loadEventFired")
        return Page(self, session)


class Page:
    """A page that has loaded."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def ask(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol."""
        return self._browser.ask(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; the page's own policy does not bind it."""
        found = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def told(self, event: str) -> list[Mapping[str, Any]]:
        """Return the parameters of every such event so far."""
        self.evaluate("new Promise(done => setTimeout(done, 50))")
        return [each["params"] for each in self._browser.events if each.get("method") == event]

    def requests(self) -> list[str]:
        """List the addresses that the page has asked for."""
        return [each["request"]["url"] for each in self.told("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """List what the console shows: refused loads, errors, and whatever a script says."""
        logged = [each["entry"]["text"] for each in self.told("Log.entryAdded")]
        thrown = [str(each["exceptionDetails"]) for each in self.told("Runtime.exceptionThrown")]
        said = [str(each["args"]) for each in self.told("Runtime.consoleAPICalled")]
        return logged + thrown + said

    def resize(self, width: int, height: int = 800) -> None:
        """Give the window a size in CSS pixels; narrow ones are phones."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def prefer(self, scheme: str) -> None:
        """Set the colour scheme that the reader prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media="screen", features=features)

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def printed(self) -> bytes:
        """Return the page as PDF."""
        self.ask("Emulation.setEmulatedMedia", media="print")
        return base64.b64decode(self.ask("Page.printToPDF")["data"])
