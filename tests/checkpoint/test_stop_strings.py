"""Stop strings against their definition: the text ends where one begins, at the first token that completes one."""

from __future__ import annotations

import random

import pytest

from llmpq.checkpoint.stop_strings import StopStrings
from llmpq.checkpoint.text_stream import TextStream
from llmpq.checkpoint.tokenizer import ByteTokenizer


def by_definition(pieces: list[str], stop: list[str], least: int) -> tuple[str, int | None]:
    """The text, and after how many pieces it ended."""
    for count in range(least + 1, len(pieces) + 1):
        text, before = "".join(pieces[:count]), "".join(pieces[: count - 1])
        starts = [i for s in stop for i in range(len(text)) if text.startswith(s, i) and i + len(s) > len(before)]
        if starts:
            return text[: min(starts)], count
    return "".join(pieces), None


def test_a_text_ends_before_the_first_stop_string_that_is_completed() -> None:
    choose = random.Random(0)
    ended = 0
    for _ in range(3000):
        pieces = ["".join(choose.choices("ab", k=choose.randrange(4))) for _ in range(choose.randrange(1, 8))]
        stop = ["".join(choose.choices("ab", k=choose.randrange(1, 6))) for _ in range(choose.randrange(4))]
        least = choose.choice([0, 0, 1, 3])
        strings, given = StopStrings(stop), ""
        text, count = by_definition(pieces, stop, least)
        for number, piece in enumerate(pieces, 1):
            given += strings.add(piece, ends=number > least)
            assert text.startswith(given)  # nothing was shown that is cut later
            assert strings.found == (number == count)
            if strings.found:
                break
        given += strings.end()
        assert given == text, (pieces, stop, least)
        ended += count is not None
    assert 500 < ended < 2500


@pytest.mark.parametrize("stop", [["京"], ["é 東"], ["x", "🦊a"], ["none"]], ids=str)
def test_a_stop_string_may_lie_across_the_bytes_of_characters(stop: list[str]) -> None:
    text, tokenizer = "aé 東京 🦊abc", ByteTokenizer(300)
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer, stop=stop)
    given = "".join(map(stream.add, tokens)) + stream.end()
    before = min((text[: text.index(s)] for s in stop if s in text), key=len, default=text)
    assert given == before and stream.stopped == (before != text)
    if stream.stopped:
        (found,) = (s for s in stop if text.startswith(s, len(before)))
        assert stream.num_tokens == len((before + found).encode())


def test_at_the_end_what_was_held_back_is_given_unless_it_is_a_stop_string() -> None:
    tokenizer = ByteTokenizer(300)
    held, stopped = TextStream(tokenizer, stop=["abc"]), TextStream(tokenizer, stop=["b"])
    assert ["".join(map(held.add, b"xab")), held.end(), held.stopped] == ["x", "ab", False]
    assert ["".join(map(stopped.add, b"a")), stopped.add(ord("b")), stopped.stopped] == ["a", "", True]
    # The last byte begins a character that never comes.
    late = TextStream(tokenizer, stop=["\ufffd"])
    assert ["".join(map(late.add, b"a\xe6")), late.end(), late.stopped] == ["a", "", True]
