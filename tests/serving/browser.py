"""Headless Chromium, driven through its DevTools protocol: pages, keys, mouse, screenshots."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 20.0
KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    "ArrowUp": 38,
    "ArrowDown": 40,
}
# What Chromium answers to a command whose page is left at that moment.
MOVED = ("navigated or closed", "context was destroyed", "Cannot find context")
MODIFIERS = {"Alt": 1, "Ctrl": 2, "Shift": 8}


def program() -> str:
    """Return the browser's path; skip without one, but not in CI, whose script installs it."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no chromium: .ci/run installs it with apt-get")
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    return found


class PageMoved(AssertionError):
    """The page went to another address while a command was under way."""


class Browser:
    """One Chromium process; every page has cookies and storage of its own."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=WAIT_S))
            if answer.get("id") == self._number:
                if any(said in str(answer.get("error")) for said in MOVED):
                    raise PageMoved(method, answer["error"])
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._events.append(answer)

    def events(self, session: str) -> list[dict[str, Any]]:
        """Return what happened in a page so far."""
        self.call("Browser.getVersion")  # whatever came before it is read now
        return [event for event in self._events if event.get("sessionId") == session]

    def page(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """Open an empty page."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        return page


class Page:
    """A page as a person uses it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> Any:
        """Send a command to this page."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int) -> None:
        """Make the window as large; below 600 pixels it is a phone's."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )

    def goto(self, url: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Evaluate an expression and return its value."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script: str, wait_s: float = WAIT_S) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            with suppress(PageMoved):  # the next page may be the one that is waited for
                if value := self.run(
                    f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
                ):
                    return value
            time.sleep(0.03)
        raise AssertionError(f"never true: {script}; the page says: {self.text('body')[:500]}")

    def text(self, selector: str) -> str:
        """Return the visible text of an element."""
        return str(self.run(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def press(self, key: str, *modifiers: str) -> None:
        """Press a key: a character, or a name such as Tab."""
        code = KEYS.get(key, ord(key.upper()[0]))
        flags = sum(MODIFIERS[name] for name in modifiers)
        event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": flags}
        typed = {"text": key} if len(key) == 1 and not flags & 3 else {}
        if key == "Enter":
            typed = {"text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def middle(self, selector: str) -> tuple[float, float]:
        """Return the middle of an element within the window, scrolled to if needed."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); "
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return box[0], box[1]

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Move, press or release the mouse."""
        down = {"button": "left", "buttons": 1, "clickCount": 1}
        held = down if kind != "mouseMoved" else {"buttons": 1, "button": "left"}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def click(self, selector: str) -> None:
        """Click an element with the mouse."""
        x, y = self.middle(selector)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def drag(self, source: str, target: str) -> None:
        """Drag one element onto another, whose place may change as the drag begins."""
        x, y = self.middle(source)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseMoved", x + 8, y + 8)
        for _ in range(2):
            box = self.middle(target)
            self.mouse("mouseMoved", *box)
        self.mouse("mouseReleased", *box)

    def offline(self, off: bool) -> None:
        """Take the network away, or give it back."""
        self.call(
            "Network.emulateNetworkConditions",
            **{"offline": off, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
        )

    def screenshot(self, path: Path) -> None:
        """Write a PNG of what the window shows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self, *, but: Callable[[str], bool] = lambda _: False) -> list[str]:
        """Return the console's errors and warnings, but for those that a test provokes."""
        found = []
        for event in self._browser.events(self._session):
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:500])
            elif event["method"] == "Log.entryAdded":
                if params["entry"]["level"] in ("error", "warning"):
                    found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(json.dumps(params["args"])[:500])
        return [text for text in found if not but(text)]


@contextmanager
def running(folder: Path) -> Iterator[Browser]:
    """Run a browser whose profile is in `folder`."""
    process = subprocess.Popen(
        [
            program(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        place = folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not place.is_file() or len(place.read_text().splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < end, "chromium does not start"
            time.sleep(0.05)
        port, path = place.read_text().splitlines()[:2]
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(20)
