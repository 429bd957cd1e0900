"""Matrices of small unsigned numbers in words of 32 bits, as others pack codes and zero points.

All of them fill words along one axis of the matrix: number after number, the first in the lowest bits, and where the
bits of a word end within a number (3 bits), it goes on in the next. They differ in the axis, and in whether the matrix
is stored transposed. AWQ has the numbers of a word in an order of its own. Ours is drawn in llmpq/quant/packing.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpq.checkpoint.tensor_index import TensorEntry

Array = np.ndarray[Any, np.dtype[Any]]
WORD = 32


@dataclass(frozen=True, slots=True)
class Fields:
    """A matrix [n, m] of numbers of `bits` bits in the int32 words of a tensor."""

    entry: TensorEntry
    bits: int  # 3, 4 or 8
    axis: int  # along which words are filled: 0 or 1
    transposed: bool  # the tensor is that of [m, n]
    order: tuple[int, ...] = ()  # the place within their word of numbers 0, 1, ...; (): in order

    def shape(self, n: int, m: int) -> tuple[int, int]:
        """That of the tensor, if the matrix is [n, m]."""
        words = [n, m]
        words[self.axis] = -(-words[self.axis] * self.bits // WORD)
        return (words[1], words[0]) if self.transposed else (words[0], words[1])

    def rows(self, words: Array, start: int, stop: int, m: int) -> Array:
        """uint8 [stop - start, m]: rows of the matrix, given the tensor uint32 as it is in the file."""
        if self.transposed:
            words = words.T
        if self.axis == 1:
            return self._unpacked(words[start:stop])[:, :m]
        unit = self.bits // math.gcd(self.bits, WORD)  # the words after which a number begins with one again
        numbers = unit * WORD // self.bits
        first = start // numbers
        columns = self._unpacked(words[first * unit : -(-stop // numbers) * unit].T)
        rows: Array = columns.T[start - first * numbers : stop - first * numbers]
        return rows

    def _unpacked(self, words: Array) -> Array:
        """uint8 [rows, numbers] of uint32 [rows, words]."""
        raw = np.ascontiguousarray(words).view(np.uint8)
        if self.bits == 8:
            return raw
        if self.bits == 4:
            numbers: Array = np.stack((raw & 15, raw >> 4), axis=-1).reshape(len(raw), -1)
        else:
            # Eight numbers are in three bytes.
            eight: Array = raw[:, : raw.shape[1] // 3 * 3].reshape(len(raw), -1, 3).astype(np.uint32)
            eight = eight[..., :1] | eight[..., 1:2] << 8 | eight[..., 2:] << 16
            numbers = (eight >> np.arange(0, 24, 3, dtype=np.uint32) & 7).astype(np.uint8).reshape(len(raw), -1)
        if self.order:
            numbers = numbers.reshape(len(raw), -1, len(self.order))[..., list(self.order)].reshape(len(raw), -1)
        return numbers


@dataclass(frozen=True, slots=True)
class SignedBytes:
    """A matrix [n, m] of int8, each a number of `bits` bits less the middle one."""

    entry: TensorEntry
    bits: int = 8
    transposed = False

    def rows(self, numbers: Array, start: int, stop: int, m: int) -> Array:
        """uint8 [stop - start, m], given the tensor as it is in the file."""
        rows: Array = numbers[start:stop].view(np.uint8) + np.uint8(2 ** (self.bits - 1))  # modulo 256
        return rows
