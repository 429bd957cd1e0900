"""Messages of errors: one line, however long and whatever characters a user's file holds."""

from __future__ import annotations

import pytest

from llmpq.spec import InfeasibleError, UsageError, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("naïve 東京 🦊  two spaces", "naïve 東京 🦊  two spaces"),
        ("one\r\n  two\n\nthree\n", "one two three"),
        ("\x1b[2J\x07\x9b\u202e\udc80", r"\x1b[2J\x07\x9b\u202e\udc80"),
    ],
)
def test_messages_are_one_line_of_printable_characters(text: str, line: str) -> None:
    assert one_line(text) == line
    assert str(UsageError(text)) == str(InfeasibleError(text)) == line
    line.encode()


@pytest.mark.parametrize("filling", ["x", "\x1b", "\n a"])
@pytest.mark.parametrize("count", [499, 500, 10**7])
def test_the_middle_of_a_long_message_is_cut(filling: str, count: int) -> None:
    line = str(UsageError(f"the beginning {filling * count} and the end"))
    assert len(line) <= 500
    assert line.startswith("the beginning ") and line.endswith(" and the end")
    assert "\n" not in line and " ... " in line
