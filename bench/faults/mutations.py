"""Damage to files: of JSON by its structure, of any file by its bytes, and what may lie in a file's place."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

_HUGE, _DEEP = "@huge@", "@deep@"  # stand for what json.dumps cannot write
_STRINGS = ("", "x" * 5000, "\0", "\x1b[31m", "\ud800", "\u200f\u202e", "16", "native", "w4-g32-sym-rtn", _HUGE, _DEEP)
_NUMBERS = (-1, 0, 1, 2, 3, 1 << 31, 1 << 63, 1 << 64, 10**30, 0.5, 1e-300, 1e300, float("nan"), float("inf"))
_VALUES: tuple[Any, ...] = (*_STRINGS, *_NUMBERS, -float("inf"), None, True, [], {}, [[]], {"a": 1}, [1, "a"])


def mutate_json(random: Random, value: Any) -> bytes:
    """The text of a JSON value with one to three changes in its structure; `value` is changed."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        inner, at = random.choice(places)
        _CHANGES[random.randrange(len(_CHANGES))](random, inner, at, places)
    text = json.dumps(value, indent=random.choice((None, 1)))
    if random.random() < 0.1 and (starts := [i for i, letter in enumerate(text) if letter == '"']):
        at = random.choice(starts)  # a key twice, where it is one
        text = text[:at] + text[at:].partition(",")[0] + "," + text[at:]
    text = text.replace(f'"{_HUGE}"', "9" * 5000).replace(f'"{_DEEP}"', "[" * 100_000)
    return text.encode(random.choice(("utf-8",) * 9 + ("utf-8-sig", "utf-16", "utf-32", "cp500")), "surrogatepass")


def _places(value: Any) -> Any:
    """(container, key) of every value within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _replace(random: Random, inner: Any, at: Any, places: Any) -> None:
    inner[at] = random.choice(_VALUES)


def _scale(random: Random, inner: Any, at: Any, places: Any) -> None:
    if isinstance(inner[at], (int, float)):
        inner[at] *= random.choice((-1, 0, 2, 1000, 10**12, 1e-9))
    else:
        inner[at] = random.choice(_NUMBERS)


def _remove(random: Random, inner: Any, at: Any, places: Any) -> None:
    del inner[at]


def _repeat(random: Random, inner: Any, at: Any, places: Any) -> None:
    if isinstance(inner, list):
        inner.insert(at, inner[at])
    else:
        inner[random.choice(("x" * 5000, "", "\x1b[2J", f"{at} "))] = inner[at]


def _exchange(random: Random, inner: Any, at: Any, places: Any) -> None:
    other, key = random.choice(places)
    inner[at] = json.loads(json.dumps(other[key]))


_CHANGES: tuple[Callable[[Random, Any, Any, Any], None], ...] = (
    _replace,
    _replace,
    _scale,
    _remove,
    _repeat,
    _exchange,
)


def mutate_bytes(random: Random, data: bytes, header: int | None = None) -> bytes:
    """One to three changes of bytes among the first `header`, or among all."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        end = min(len(changed), header or len(changed))
        at = random.randrange(end + 1)
        size = random.choice((1, 1, 2, 8, 64))
        match random.randrange(5):
            case 0:
                changed[at : at + size] = random.randbytes(size)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[max(0, at - size) : at]
            case _:
                changed[at : at + 8] = struct.pack("<q", random.choice((-1, 0, 1, 1 << 31, 1 << 40, (1 << 63) - 1)))
    return bytes(changed)


def misplace(random: Random, path: Path) -> None:
    """Put something else in a file's place."""
    path.unlink()
    match random.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path.with_name("nowhere"))
        case 2:
            path.symlink_to(path)
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to("/dev/zero")
        case _:
            path.touch()


@dataclass(frozen=True)
class Gguf:
    """A GGUF file of version 3: metadata as (key, type, value as stored), tensors as their table has them, data."""

    metadata: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]  # name, dimensions, type, offset
    data: bytes

    def encode(self) -> bytes:
        out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.metadata)))
        for key, kind, value in self.metadata:
            out += gguf_string(key) + struct.pack("<I", kind) + value
        for name, dimensions, kind, offset in self.tensors:
            out += gguf_string(name) + struct.pack("<I", len(dimensions))
            out += b"".join(struct.pack("<Q", size % 2**64) for size in dimensions)
            out += struct.pack("<IQ", kind, offset % 2**64)
        return bytes(out + bytes(-len(out) % 32) + self.data)

    def mutated(self, random: Random) -> bytes:
        """With a value of another kind, or a wrong, missing or second entry, in its metadata or its table."""
        metadata, tensors = list(self.metadata), list(self.tensors)
        at = random.randrange(len(metadata) + len(tensors))
        if at < len(metadata):
            _change_entry(random, metadata, at, lambda entry: (entry[0], *random.choice(GGUF_VALUES)))
        else:
            _change_entry(random, tensors, at - len(metadata), lambda entry: _other_tensor(random, entry))
        return replace(self, metadata=tuple(metadata), tensors=tuple(tensors)).encode()


def _change_entry(random: Random, entries: list[Any], at: int, change: Callable[[Any], Any]) -> None:
    match random.randrange(6):
        case 0:
            del entries[at]
        case 1:
            entries.append(entries[at])
        case _:
            entries[at] = change(entries[at])


def _other_tensor(random: Random, entry: tuple[bytes, tuple[int, ...], int, int]) -> tuple[Any, ...]:
    name, dimensions, kind, offset = entry
    match random.randrange(4):
        case 0:
            return name + b"x", dimensions, kind, offset
        case 1:
            sizes = (dimensions[:-1], (*dimensions, 1), (*dimensions[:-1], random.choice((0, -1, 1 << 40))), (1,) * 9)
            return name, random.choice(sizes), kind, offset
        case 2:
            return name, dimensions, random.choice((1, 2, 8, 12, 30, 99, 1 << 31)), offset
        case _:
            return name, dimensions, kind, random.choice((0, 1, 32, -32, 1 << 40))


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _array(kind: int, count: int, values: bytes) -> tuple[int, bytes]:
    return 9, struct.pack("<IQ", kind, count) + values


_EMPTY = struct.pack("<IQ", 4, 0)  # an array of no numbers
GGUF_VALUES: tuple[tuple[int, bytes], ...] = (
    *((4, struct.pack("<I", number)) for number in (0, 1, 3, 7, 10**9, 2**32 - 1)),
    *((5, struct.pack("<i", number)) for number in (-1, -(2**31))),
    *((6, struct.pack("<f", number)) for number in (0.0, -1.0, 1e30, float("nan"), float("inf"))),
    *((10, struct.pack("<Q", number)) for number in (2**63, 2**64 - 1)),
    *((12, struct.pack("<d", number)) for number in (1e-300, 1e300)),
    *((7, bytes([number])) for number in (0, 1, 2)),
    *((8, gguf_string(text)) for text in (b"", b"linear", b"\xff\xfe", b"\x1b[31m", b"x" * 5000)),
    (8, struct.pack("<Q", 2**60)),
    (99, b""),
    _array(4, 0, b""),
    _array(4, 2, struct.pack("<II", 2, 2)),
    _array(4, 2, struct.pack("<II", 1, 2)),
    _array(4, 2**60, b""),
    _array(8, 1, gguf_string(b"a")),
    _array(9, 2, _EMPTY * 2),
    (9, struct.pack("<IQ", 9, 1) * 50_000 + _EMPTY),
)
