"""A headless Chromium by its DevTools protocol over pipes: https://chromedevtools.github.io/devtools-protocol/.

`LLMPQ_CHROMIUM` names its executable, if it is none of the usual ones.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--single-process", "--no-first-run")
_SOON_S = 30.0


def executable() -> str | None:
    """Where there is one."""
    named = os.environ.get("LLMPQ_CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """A page that is open. `problems`: what it has written to its console as errors, or thrown."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.problems: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Runtime.enable")
        self._ask("Page.enable")

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until it is true; what it throws before is not looked at."""
        expression = f"(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()"
        until = time.monotonic() + _SOON_S
        while not (found := self.value(expression)):
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)
        return found

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        for message in self._messages():
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)
        raise AssertionError("the browser has ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" in self._rest:
                message, _, self._rest = self._rest.partition(b"\0")
                yield json.loads(message)
            assert select.select([self._answers], [], [], _SOON_S)[0], "the browser does not answer"
            data = os.read(self._answers, 2**16)
            if not data:
                return
            self._rest += data

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.problems.append(json.dumps(params["args"])[:500])


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in a folder."""
    found = executable()
    assert found is not None
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()

    def as_three_and_four() -> None:
        os.dup2(os.dup(theirs_in), 13), os.dup2(os.dup(theirs_out), 14)
        os.dup2(13, 3), os.dup2(14, 4)

    command = [found, *_OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, preexec_fn=as_three_and_four, close_fds=False, **quiet) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(commands, answers)
        finally:
            process.kill()
            os.close(commands)
            os.close(answers)
