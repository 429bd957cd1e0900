"""The few PTX instructions of llmpq/kernels/backends/triton_codes.py on NumPy arrays, as the PTX ISA defines them.

Triton's interpreter runs no inline assembly. With this in its place, it runs the very strings that a GPU is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Words = np.ndarray  # uint32


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of IEEE 754's kind."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    def decode(self, bits: np.ndarray) -> np.ndarray:
        """float64 numbers, exact. Infinities and NaN are refused: no code, zero or magic number is one."""
        mantissa = bits & ((1 << self.mantissa_bits) - 1)
        exponent = (bits >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        sign = (bits >> (self.exponent_bits + self.mantissa_bits)) & 1
        assert (exponent < 2**self.exponent_bits - 1).all(), "a number that is not finite"
        fraction = mantissa + np.where(exponent == 0, 0, 1 << self.mantissa_bits)
        scale = np.maximum(exponent, 1).astype(np.int64) - self.bias - self.mantissa_bits
        return np.where(sign == 1, -1.0, 1.0) * np.ldexp(fraction.astype(np.float64), scale)

    def encode(self, numbers: np.ndarray) -> np.ndarray:
        """The bits, as int64, of the nearest numbers of the format, of two equally near the even one."""
        least = 1 - self.bias
        exponent = np.where(numbers == 0, least, np.maximum(np.frexp(numbers)[1].astype(np.int64) - 1, least))
        units = np.rint(np.ldexp(np.abs(numbers), self.mantissa_bits - exponent)).astype(np.int64)
        # Units reach up to 2**(mantissa_bits + 1), which carries into the exponent where it is added.
        magnitude = units + ((exponent - least) << self.mantissa_bits)
        assert (magnitude < (2**self.exponent_bits - 1) << self.mantissa_bits).all(), "an overflow"
        return magnitude | (np.signbit(numbers).astype(np.int64) << (self.exponent_bits + self.mantissa_bits))


F16, BF16, F32 = Format(5, 10), Format(8, 7), Format(8, 23)


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, which must be exact, so that only the format rounds."""
    total = a + b
    assert (total - a == b).all() and (total - b == a).all(), "float64 is too short for this sum"
    return total


def _fma(kind: Format, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return kind.encode(_sum(kind.decode(a) * kind.decode(b), kind.decode(c)))


def _add(kind: Format, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return kind.encode(_sum(kind.decode(a), kind.decode(b)))


def _in_halves(operation: Callable[..., np.ndarray], kind: Format) -> Callable[..., Words]:
    def apply(*words: Words) -> Words:
        low = operation(kind, *((word & 0xFFFF).astype(np.int64) for word in words))
        high = operation(kind, *((word >> 16).astype(np.int64) for word in words))
        return (low | high << 16).astype(np.uint32)

    return apply


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Each bit is the entry of the 8-bit table that the three bits of a, b and c, a's first, are the number of."""
    result = np.zeros(np.broadcast(a, b, c).shape, dtype=np.uint32)
    for entry in range(8):
        if int(table) >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Nibble i of the selector names the byte of b:a that becomes byte i; its top bit: copies of the byte's sign."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, dtype=np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = (source >> (8 * (nibble & 7)).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.f16x2": _in_halves(_fma, F16),
    "fma.rn.bf16x2": _in_halves(_fma, BF16),
    "add.rn.f16x2": _in_halves(_add, F16),
    "add.rn.f32": lambda a, b: _add(F32, a.astype(np.int64), b.astype(np.int64)).astype(np.uint32),
}


def run(program: str, *operands: np.ndarray) -> Words:
    """What a program leaves in $0, given $1, $2, ... of 32 bits each. Raises KeyError for what is not known here."""
    registers = {f"${i}": np.asarray(operand).astype(np.uint32) for i, operand in enumerate(operands, 1)}
    for statement in program.strip(" {}").split(";"):
        words = re.split(r"[\s,]+", statement.strip())
        if words[0] in ("", ".reg"):
            continue
        target, *sources = words[1:]
        values = [registers[name] if name in registers else np.uint32(int(name, 0)) for name in sources]
        registers[target] = INSTRUCTIONS[words[0]](*values)
    return registers["$0"]
