"""Chromium and Firefox for tests, by WebDriver BiDi, the protocol that both of them speak (https://w3c.github.io/webdriver-bidi)."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEEDED = {"chromium": ("chromium", "chromedriver"), "firefox": ("firefox-esr",)}
PATIENCE = 120.0  # seconds for anything that a browser does; a busy machine is slow
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900"]


def missing(name: str) -> str:
    """Return why tests with this browser are skipped, or nothing."""
    programs = [program for program in NEEDED[name] if not shutil.which(program)]
    if programs:
        return f"{' and '.join(programs)} not installed"
    try:
        import websocket  # noqa: F401
    except ImportError:
        return "the package websocket-client is not installed"
    return ""


class Browser:
    """An open browser with one window.

    Attributes:
        name: chromium or firefox.
        downloads: the folder in which the browser saves files.
        problems: errors and warnings on the console.
        requests: addresses that the page has asked for.
    """

    def __init__(self, name: str, address: str, downloads: Path):
        import websocket

        self.name, self.downloads = name, downloads
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=PATIENCE)
        self._count = 0
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        if self.name == "firefox":
            self.command("session.new", capabilities={})
        self.command("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        self._window = self.command("browsingContext.getTree")["contexts"][0]["context"]
        self.command("browsingContext.setViewport", context=self._window, viewport={"width": 1300, "height": 900})

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result. What the page reports in the meantime is kept."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                assert answer["type"] == "success", answer
                return answer["result"]
            event = answer.get("params", {})
            if answer.get("method") == "log.entryAdded" and event["level"] in ("error", "warn"):
                self.problems.append(event["text"])
            if answer.get("method") == "network.beforeRequestSent" and event["context"] == self._window:
                self.requests.append(event["request"]["url"])

    def open(self, address: str) -> None:
        """Open an address and wait until the page is complete."""
        self.command("browsingContext.navigate", context=self._window, url=address, wait="complete")

    def reload(self) -> None:
        """Load the page again."""
        self.command("browsingContext.reload", context=self._window, wait="complete")

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page, or of what it promises."""
        code = f"Promise.resolve({expression}).then((value) => JSON.stringify(value ?? null))"
        answer = self.command(
            "script.evaluate", expression=code, target={"context": self._window}, awaitPromise=True, userActivation=True
        )
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"]["value"])

    def wait(self, expression: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"!!({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a selector that holds a text."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find((e) => e.textContent.includes({json.dumps(text)}))"
        self.wait(found)
        self.run(f"{found}.click()")

    def point(self, *places: tuple[float, float], pressed: bool = False) -> None:
        """Move the mouse along places in the window. With `pressed`, the button is down from the first to the last one."""
        moves: list[dict[str, Any]] = [
            {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0} for x, y in places
        ]
        if pressed:
            moves.insert(1, {"type": "pointerDown", "button": 0})
            moves.append({"type": "pointerUp", "button": 0})
        self.command(
            "input.performActions",
            context=self._window,
            actions=[{"type": "pointer", "id": "mouse", "actions": moves}],
        )

    def press(self, *keys: str) -> None:
        """Press and release keys."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.command(
            "input.performActions", context=self._window, actions=[{"type": "key", "id": "keys", "actions": actions}]
        )

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(self.command("browsingContext.captureScreenshot", context=self._window)["data"])

    def saved(self, name: str) -> Path:
        """Wait until the browser has saved a file, and return its path."""
        path, end = self.downloads / name, time.monotonic() + PATIENCE
        while not path.exists() or not path.stat().st_size or list(self.downloads.glob("*.part")):
            assert time.monotonic() < end, f"{name} was not saved"
            time.sleep(0.02)
        return path

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def started(name: str, folder: Path) -> Iterator[Browser]:
    """Start a browser without a window on the screen.

    Args:
        folder: an empty folder for its profile and for what it saves.
    """
    downloads, profile = folder / "downloads", folder / "profile"
    downloads.mkdir()
    profile.mkdir()
    start = _start_chromium if name == "chromium" else _start_firefox
    with start(profile, downloads) as address, contextlib.closing(Browser(name, address, downloads)) as browser:
        yield browser


@contextlib.contextmanager
def _process(words: list[str], pattern: str, log: Path) -> Iterator[str]:
    """Start a program, and yield the part of its output that a pattern finds."""
    with open(log, "w") as file, subprocess.Popen(words, stdout=file, stderr=file) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not (found := re.search(pattern, log.read_text())):
                running = process.poll() is None and time.monotonic() < end
                assert running, f"{words[0]} did not start: {log.read_text()}"
                time.sleep(0.02)
            yield found[1]
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


@contextlib.contextmanager
def _start_chromium(profile: Path, downloads: Path) -> Iterator[str]:
    words = ["chromedriver", "--port=0"]
    with _process(words, r"started successfully on port (\d+)", profile.parent / "log") as port:
        chrome = {
            "binary": shutil.which("chromium"),
            "args": [*QUIET, f"--user-data-dir={profile}"],
            "prefs": {"download.default_directory": str(downloads)},
        }
        capabilities = {"alwaysMatch": {"webSocketUrl": True, "goog:chromeOptions": chrome}}
        body = json.dumps({"capabilities": capabilities}).encode()
        address = f"http://127.0.0.1:{port}/session"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            session = json.load(answer)["value"]
        try:
            yield session["capabilities"]["webSocketUrl"]
        finally:
            end = urllib.request.Request(f"{address}/{session['sessionId']}", method="DELETE")
            urllib.request.urlopen(end, timeout=PATIENCE).close()


@contextlib.contextmanager
def _start_firefox(profile: Path, downloads: Path) -> Iterator[str]:
    settings = {
        "browser.download.folderList": 2,
        "browser.download.dir": str(downloads),
        "browser.download.alwaysOpenPanel": False,
        "browser.shell.checkDefaultBrowser": False,
        "datareporting.policy.dataSubmissionEnabled": False,
    }
    lines = [f"user_pref({json.dumps(key)}, {json.dumps(value)});" for key, value in settings.items()]
    (profile / "user.js").write_text("\n".join(lines))
    words = [
        "firefox-esr",
        "--headless",
        "--no-remote",
        "--profile",
        str(profile),
        "--remote-debugging-port",
        "0",
        "about:blank",
    ]
    with _process(words, r"WebDriver BiDi listening on (ws://\S+)", profile.parent / "log") as address:
        yield f"{address}/session"
