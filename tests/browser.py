"""A headless Chromium for tests, driven over its own debugging pipe (Chrome DevTools Protocol): no further package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"]


class Browser:
    """One page. `errors` are what its console complained of, `requests` all that it asked of the network or of files."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int):
        self._process, self._to, self._back = process, to, back
        self._buffer, self._number, self._session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def window(self, width: int, height: int, dark: bool = False) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 90.0) -> Any:
        """The expression's value as soon as it is true; what the page says, where it never is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError):  # between two pages
                if found := self.run(script):
                    return found
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds:g} s: {script}\n{self.run('document.body.innerText')[:3000]}")

    def click(self, text: str) -> None:
        """Press the mouse on the smallest element that reads so, as soon as there is one."""
        found = f"[...document.querySelectorAll('*')].filter((e) => e.innerText?.trim() === {json.dumps(text)}).at(-1)"
        middle = f"(() => {{ const r = {found}?.getBoundingClientRect(); return r && [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        x, y = self.wait(middle)
        for event in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        image = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(image))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                result: dict[str, Any] = found["result"]
                return result
            self._note(found.get("method", ""), found.get("params", {}))

    def _read(self, seconds: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], seconds)
            piece = os.read(self._back, 1 << 20) if ready else b""
            assert piece, f"Chromium {'ended' if ready else 'says nothing'}"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(facts["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
            self.errors.append(json.dumps(facts["args"]))
        elif event == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.errors.append(facts["entry"]["text"] + " " + facts["entry"].get("url", ""))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium with an empty profile, ended in every case."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4; high numbers don't collide with these.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
    words = ["bash", "-c", f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}']
    words += [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(words, pass_fds=high, stdout=log, stderr=log, start_new_session=True)
    for end in (theirs_in, theirs_out, *high):
        os.close(end)
    try:
        yield Browser(process, ours_out, ours_in)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        os.close(ours_out)
        os.close(ours_in)
