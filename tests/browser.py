"""A headless Chromium, spoken to through the DevTools protocol over two pipes: no driver, no further package.

And what must hold of the look of every page of ours: tests/report and tests/website have more to ask of theirs.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60.0
MOST_PX = 5000  # of the height of a picture
SIZES = {"phone": (360, 800), "desktop": (1280, 900)}
WINDOWS = {f"{name}-{scheme}": (*size, scheme) for name, size in SIZES.items() for scheme in ("light", "dark")}
LOOPBACK = "127.0.0.1"
FAINT_TEXT = """(() => {
    const known = make => {
        const values = new Map();
        return key => values.get(key) ?? values.set(key, make(key)).get(key);
    };
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = known(colour => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].map(value => value / 255);
    });
    const over = (top, below, alpha) => below.map((value, i) => alpha * top[i] + (1 - alpha) * value);
    const behind = known(element => {
        if (!element) return [1, 1, 1];
        const colour = rgba(getComputedStyle(element).backgroundColor);
        return over(colour, behind(element.parentElement), colour[3]);
    });
    const opacity = known(element => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1);
    const light = colour => colour.slice(0, 3).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const faint = {};
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
        if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
        const style = getComputedStyle(element), colour = rgba(style.color), below = behind(element);
        const shown = over(colour, below, colour[3] * opacity(element));
        const [high, low] = [light(below), light(shown)].sort((a, b) => b - a);
        const ratio = (high + 0.05) / (low + 0.05), px = parseFloat(style.fontSize);
        const isLarge = px >= 24 || (px >= 18.66 && style.fontWeight >= 700);
        const key = `${element.tagName.toLowerCase()}.${element.className.baseVal ?? element.className}`;
        const said = `${key} "${text.slice(0, 30)}" has a contrast of ${ratio.toFixed(2)}`;
        if (ratio < (isLarge ? 3 : 4.5)) faint[key] ??= said;
    }
    return Object.values(faint);
})()"""  # by the rules of WCAG 2, level AA, one line for each kind of element


def installed_chromium() -> str | None:
    """The path of one; of Debian's, where this process may install it and none was there."""
    if _find_chromium() is None and os.geteuid() == 0:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    return _find_chromium()


def _find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab of a browser that reaches this machine alone, and what went wrong in it so far."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer, self._number, self._session = b"", 0, None
        self.problems: list[str] = []  # errors and warnings of the console, uncaught exceptions
        self.requests: list[str] = []  # every address that was asked for
        self.has_loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)
        raise RuntimeError(f"{method}: the browser has gone")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._buffer:
                received = os.read(self._from, 1 << 16)
                if not received:
                    return
                self._buffer += received
            message, _, self._buffer = self._buffer.partition(b"\0")
            yield json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.has_loaded = True

    def show(self, url: str, window: str) -> None:
        """Opens an address in one of WINDOWS."""
        width, height, scheme = WINDOWS[window]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.has_loaded = False
        self.call("Page.navigate", url=url)
        end = time.monotonic() + PATIENCE_S
        while not self.has_loaded and time.monotonic() < end:
            self.ask("0")
            time.sleep(0.05)
        # two frames, so that what watches sizes has drawn
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses and lets go of a key, such as Tab, Enter or ArrowRight."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        key_event: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        if key == "Enter":
            key_event["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **key_event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key_event)

    def write(self, text: str) -> None:
        """Types a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, x: float, y: float) -> None:
        """Presses and lets go of the mouse at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self) -> bytes:
        """A PNG of the page, of a long one of its beginning."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], MOST_PX), "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])


@contextmanager
def opened(chromium: str) -> Iterator[Page]:
    """A tab of a browser that is ended with the block."""
    browser_reads, we_write = os.pipe()
    we_read, browser_writes = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        options.append(f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {LOOPBACK}")
        # the protocol wants descriptors 3 and 4
        command = f'exec "$0" "$@" --remote-debugging-pipe 3<&{browser_reads} 4>&{browser_writes}'
        fds = (browser_reads, browser_writes)
        process = subprocess.Popen(["bash", "-c", command, chromium, *options], pass_fds=fds, stderr=subprocess.DEVNULL)
        for descriptor in fds:
            os.close(descriptor)
        try:
            yield Page(we_write, we_read)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            os.close(we_write)
            os.close(we_read)


def flaws_of_look(page: Page, url: str, window: str, picture: Path) -> Iterator[str]:
    """What is wrong with the look of a page that is opened in a window, of which a picture is kept."""
    page.show(url, window)
    picture.write_bytes(page.screenshot())
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    if len(np.unique(pixels.reshape(-1, 3), axis=0)) < 100:
        yield "the picture is blank"
    width_px, _, scheme = WINDOWS[window]
    if (np.median(pixels) < 128) != (scheme == "dark"):
        yield f"the picture is not {scheme}"
    page_px = page.ask("document.documentElement.scrollWidth")
    if page_px > width_px:
        yield f"{page_px} px wide in a window of {width_px}"
    yield from page.ask(FAINT_TEXT)


def flaws_of_traffic(page: Page, home: str) -> Iterator[str]:
    """What went wrong in a page since this was asked last, and what it asked for that does not begin with its home."""
    yield from page.problems
    yield from (f"{url} was asked for" for url in page.requests if not url.startswith((home, "data:", "blob:")))
    page.problems.clear()
    page.requests.clear()
