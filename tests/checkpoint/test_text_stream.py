"""Text as it comes: joined, it is the text of all tokens, and no piece ends within a character."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmpq.checkpoint.text_stream import TextStream
from llmpq.checkpoint.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from tests.checkpoint.test_tokenizer import sentencepiece_like
from tests.support.tiny_models import save_tokenizer

TEXT = "Once upon é a 東京. 🦊🦊 a\n\ta time é"


def _pieces(tokenizer: Tokenizer, tokens: list[int], after: list[int]) -> list[str]:
    stream = TextStream(tokenizer, after=after)
    return [*map(stream.add, tokens), stream.end()]


@pytest.mark.parametrize("kind", ["pieces", "bytes", "none"])
def test_what_is_streamed_is_the_text_in_whole_characters(kind: str, tmp_path: Path) -> None:
    if kind == "none":
        tokenizer: Tokenizer = ByteTokenizer(300)
    else:
        sentencepiece_like(tmp_path) if kind == "pieces" else save_tokenizer(tmp_path)
        tokenizer = open_tokenizer(tmp_path)
    tokens = tokenizer.encode(TEXT)
    for after in ([], tokenizer.encode("a"), tokens):
        pieces = _pieces(tokenizer, tokens, after)
        assert "".join(pieces) == tokenizer.decode(tokens, after=after)
        assert "\ufffd" not in "".join(pieces) or kind == "pieces"  # which has no token for what it does not know
        assert len(list(filter(None, pieces))) > len(TEXT) / 2
    randomly = random.Random(0)
    for _ in range(50):  # bytes that are no characters, ends in the middle of one, special tokens
        tokens = randomly.choices(range(256), k=12)
        assert "".join(_pieces(tokenizer, tokens, [])) == tokenizer.decode(tokens)
