"""What the tokens of a vocabulary stand for, in bytes: a token may be a part of a character."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character by themselves


def token_bytes(tokenizer: Any) -> tuple[bytes, ...]:
    """Of each id of a transformers tokenizer what it adds to a text; nothing for special tokens, and ids of none.

    It is what a token's text is longer by behind another one, so the tokenizer's own rules for spaces hold. Where that
    is no whole character, the token's name tells its bytes.
    """
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    ids = sorted(names)
    anchor = _anchor(tokenizer, ids)
    before = len(_texts(tokenizer, [[anchor]])[0])
    found = [b""] * (ids[-1] + 1)
    for token, text in zip(ids, _texts(tokenizer, [[anchor, token] for token in ids]), strict=True):
        added = text[before:]
        found[token] = _named(names[token], added) if _INCOMPLETE in added else added.encode()
    return tuple(found)


def _anchor(tokenizer: Any, ids: Sequence[int]) -> int:
    """A token that is a letter by itself, and so changes nothing behind it. Raises ValueError."""
    found = next((token for token in ids if re.fullmatch("[A-Za-z]", _texts(tokenizer, [[token]])[0])), None)
    if found is None:
        raise ValueError("it has no token that is a letter")
    return found


def _texts(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found: list[str] = backend.decode_batch(rows, skip_special_tokens=True)
        return found
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(row, **how) for row in rows]


def _named(name: str, text: str) -> bytes:
    """The bytes that a token's name stands for, else its text."""
    single = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    if single is not None:
        return bytes.fromhex(single[1])
    values = [_byte_of_character().get(character) for character in name]
    return text.encode() if None in values else bytes(value for value in values if value is not None)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Of the characters by which GPT-2's vocabulary, and those like it, write bytes.

    Bytes that are printed characters of Latin-1 are themselves, the others follow one another from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
