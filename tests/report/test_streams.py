"""Standard output and error: nothing that is printed ends the work or reaches a terminal as a command."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from llmpq.report.streams import Stream
from llmpq.spec.formatting import printable

EVIL = "a\x1b[2J\x07b\x9b1m\rc\x7f"


def test_control_characters_are_shown_and_all_else_is_left() -> None:
    assert printable(EVIL) == r"a\x1b[2J\x07b\x9b1m\x0dc\x7f"
    kept = "naïve 東京\n\tein\u00a0Paar 👨\u200d👩"
    assert printable(kept) == kept


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_printed_is_printable(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    stream = Stream()
    stream.file = printed
    stream._force_terminal = terminal
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    for what in (EVIL, Text(EVIL), table):
        stream.print(what, soft_wrap=True)
    assert "\\x1b[2J" in printed.getvalue()
    own = printed.getvalue().replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")  # rich's styles
    assert not set(own) & set("\x1b\x07\x9b\r\x7f")


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    begin = "import sys; from llmpq.cli import main as m; from llmpq.report.streams import OUT, ERR\n"
    execute = "m.build_parser = lambda: type('P', (), {'parse_args': lambda self, argv: "
    code = f"{begin}def execute(_):\n    {code}\n{execute}type('A', (), {{'execute': staticmethod(execute)}})}})()\n"
    command = [sys.executable, "-c", f"{code}sys.exit(m.main([]))"]
    return subprocess.run(command, text=True, **{"stderr": subprocess.PIPE, **options})  # type: ignore[call-overload,no-any-return]


MUCH = "[OUT.print('x' * 1000) for _ in range(100)]; print('y'); ERR.print('done')"


def test_a_full_disk_behind_standard_output_is_said_at_the_end() -> None:
    with open("/dev/full", "w") as full:
        found = run(MUCH, stdout=full)
    assert found.returncode == 2
    assert found.stderr == "done\nllmpq: cannot write to standard output: No space left on device\n"


def test_a_reader_that_has_gone_keeps_nothing_from_being_done() -> None:
    for both in (False, True):
        reading, writing = os.pipe()
        os.close(reading)
        found = run(MUCH, stdout=writing, **({"stderr": writing} if both else {}))
        os.close(writing)
        assert found.returncode == 0
        assert found.stderr == (None if both else "done\n")


def test_closed_streams_are_nobodys() -> None:
    closed = "import os; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    code = (
        "import sys; from llmpq.cli import main as m; m._open_standard_streams(); print('x'); "
        "print('x', file=sys.stderr); sys.exit(0 if open('/dev/null').fileno() > 2 and sys.stdin.read() == '' else 7)"
    )
    assert subprocess.run([sys.executable, "-c", f"import sys; {closed}", code]).returncode == 0


def test_characters_that_an_encoding_lacks_are_replaced() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = run("OUT.print('größer 東'); print('é')", stdout=subprocess.PIPE, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (0, "gr??er ?\n?\n", "")
