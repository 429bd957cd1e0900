"""A linear that others have quantized, as rows: codes with their scales and zero points, or floating numbers.

Each form (from_gptq.py and its like) says where the tensors of a linear lie and makes one of these of them. Arrays are
those of numpy, so that what a checkpoint says is read without torch; weights.py makes Rows of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmpq.checkpoint.bit_fields import Array, Fields, SignedBytes
from llmpq.checkpoint.tensor_index import TensorEntry, stored_bytes
from llmpq.spec import GROUP_SIZES, Precision, UsageError

Open = Callable[[TensorEntry], Array]  # a tensor in its shape, as `as_array` has it
_NUMPY = {
    **dict.fromkeys(("U8", "F8_E4M3", "F8_E5M2"), "u1"),
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<u4",  # words of bits
    "I8": "i1",
}
SCALES = ("F16", "BF16", "F32")  # types of scales; all but the last are a QuantTensor's
FLOATS = ("F8_E4M3", "F8_E5M2")


def as_array(entry: TensorEntry, raw: Array) -> Array:
    """The bytes of a tensor, uint8 [nbytes], in its shape; of types that numpy lacks, the bits as whole numbers."""
    return raw.view(_NUMPY[entry.type]).reshape(entry.shape)


def stored_array(entry: TensorEntry) -> Array:
    """A tensor as it is in its file, for small ones that say how others are stored."""
    return as_array(entry, np.array(stored_bytes(entry)))


def as_floats(entry: TensorEntry, stored: Array) -> Array:
    """float32: what a part of a floating tensor's array stands for."""
    if entry.type == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if entry.type.startswith("F8"):
        return _small_floats(4 if entry.type == "F8_E4M3" else 5)[stored]
    return stored.astype(np.float32)


@functools.cache
def _small_floats(exponent_bits: int) -> Array:
    """float32 [256]: the numbers of the OCP's 8-bit floating types E4M3 (no infinities) and E5M2, by their bits.

    Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0, section 5.
    """
    fraction_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    bits = np.arange(256)
    exponent, fraction = bits >> fraction_bits & 2**exponent_bits - 1, bits & 2**fraction_bits - 1
    significand = np.where(exponent == 0, fraction, fraction + 2**fraction_bits)
    magnitude = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - fraction_bits)
    if exponent_bits == 4:
        magnitude[(bits & 0x7F) == 0x7F] = np.nan
    else:
        magnitude[(bits & 0x7F) == 0x7C], magnitude[(bits & 0x7F) > 0x7C] = np.inf, np.nan
    numbers: Array = np.where(bits >> 7, -magnitude, magnitude).astype(np.float32)
    return numbers


@dataclass(frozen=True, slots=True)
class IntegerLinear:
    """w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]), with g the group of column k."""

    name: str  # of its weight, had it one
    shape: tuple[int, int]  # n, k
    codes: Fields | SignedBytes  # [n, k]
    scales: TensorEntry  # [n, groups] or, where the codes' tensor is transposed, [groups, n]
    zeros: Fields | SignedBytes | None  # [n, groups]; None: all are the middle code
    group_size: int | None  # None: the whole row
    symmetric: bool  # all zeros are the middle code
    less_one: bool = False  # zeros are stored less 1
    groups: TensorEntry | None = None  # of each column, where they are not group_size columns after each other

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        zeros = None if self.zeros is None else self.zeros.entry
        return tuple(e for e in (self.codes.entry, self.scales, zeros, self.groups) if e is not None)

    @property
    def not_native(self) -> str:
        """Why kernels do not read it as it is; empty: they do."""
        if self.groups is not None:
            return "groups of columns in no order (act-order)"
        if self.scales.type == "F32":
            return f"scales in {self.scales.type}"
        return "" if self.group_size is None or self._held is not None else f"groups of {self.group_size}"

    @property
    def precision(self) -> Precision | None:
        """That of its rows as QuantTensors; None: they are floating numbers."""
        if self.not_native:
            return None
        return Precision(self.codes.bits, self._held, "sym" if self.symmetric else "asym", "stored")

    @property
    def _held(self) -> int | None:
        """The largest of our groups that its own can be cut into."""
        size = self.group_size
        return None if size is None else next((held for held in reversed(GROUP_SIZES) if size % held == 0), None)

    @property
    def _count(self) -> int:
        """Groups of a row."""
        return -(-self.shape[1] // (self.group_size or self.shape[1]))

    def code_rows(self, tensor: Open, start: int, stop: int) -> Array:
        """uint8 [rows, k]."""
        return self.codes.rows(tensor(self.codes.entry), start, stop, self.shape[1])

    def scale_rows(self, tensor: Open, start: int, stop: int) -> Array:
        """[rows, groups] as stored."""
        scales = tensor(self.scales)
        return (scales.T if self.codes.transposed else scales)[start:stop]

    def zero_rows(self, tensor: Open, start: int, stop: int) -> Array:
        """uint8 [rows, groups]. UsageError for zero points that are not what the configuration says, or ambiguous."""
        middle, count = 2 ** (self.codes.bits - 1), self._count
        if self.zeros is None:
            return np.full((stop - start, count), middle, np.uint8)
        zeros = self.zeros.rows(tensor(self.zeros.entry), start, stop, count)
        where = f"{self.zeros.entry.path}: {self.zeros.entry.name}"
        if self.less_one:
            if (zeros == 2 * middle - 1).any():
                raise UsageError(
                    f"{where} has a zero point of 0, which this form stores as -1 and which its readers take for "
                    "different numbers; save the model in the form gptq_v2"
                )
            zeros = zeros + np.uint8(1)
        if (zeros > 2 * middle - 1).any():
            raise UsageError(f"{where} has zero points that are no numbers of {self.codes.bits} bits")
        if self.symmetric and (zeros != middle).any():
            raise UsageError(
                f"{where} has zero points other than {middle}, but the configuration says that there are none; "
                "correct its quantization_config"
            )
        return zeros

    def held_per_group(self, rows: Array) -> Array:
        """Scales or zeros [rows, groups] with those of groups larger than ours once for each of ours."""
        size, held = self.group_size, self._held
        if size is None or held is None or size == held:
            return rows
        return np.repeat(rows, size // held, 1)[:, : -(-self.shape[1] // held)]

    def floating(self, tensor: Open, start: int, stop: int) -> Array:
        """float32 [rows, k]: the weights, rounded once."""
        k = self.shape[1]
        groups = np.arange(k) // (self.group_size or k) if self.groups is None else tensor(self.groups)
        scales = as_floats(self.scales, self.scale_rows(tensor, start, stop))
        weights = self.code_rows(tensor, start, stop).astype(np.float32)
        weights -= self.zero_rows(tensor, start, stop)[:, groups]
        weights *= scales[:, groups]
        return weights


@dataclass(frozen=True, slots=True)
class ScaledLinear:
    """w[n, k] = number[n, k] * scale / divisor: small floating numbers, or int8, with a scale for each block."""

    name: str
    shape: tuple[int, int]
    numbers: TensorEntry
    scales: TensorEntry
    block: tuple[int, int]  # rows and columns that share a scale
    divisor: float = 1.0
    others: tuple[TensorEntry, ...] = ()  # tensors that say nothing of the weights

    precision = None

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        return (self.numbers, self.scales, *self.others)

    @property
    def not_native(self) -> str:
        return f"numbers in {self.numbers.type}"

    def floating(self, tensor: Open, start: int, stop: int) -> Array:
        """float32 [rows, k]."""
        rows, columns = self.block
        k = self.shape[1]
        scales = as_floats(self.scales, tensor(self.scales)).reshape(-(-self.shape[0] // rows), -(-k // columns))
        scales = scales[np.arange(start, stop) // rows].astype(np.float64) / self.divisor
        numbers = as_floats(self.numbers, tensor(self.numbers)[start:stop])
        weights: Array = (numbers * np.repeat(scales, min(columns, k), 1)[:, :k]).astype(np.float32)
        return weights


@dataclass(frozen=True, slots=True)
class CodebookLinear:
    """w[i] = codebook[code[i]] * scale[i // block] for the elements of [n, k] in order, whatever the rows.

    Two codes of 4 bits are in a byte, the first in the upper half. Scales may themselves be quantized so, in 8 bits:
    scale[j] = inner_codebook[code[j]] * inner_scale[j // inner_block] + offset.
    """

    name: str
    shape: tuple[int, int]
    codes: TensorEntry  # of any type
    codebook: TensorEntry  # F32 [16]
    scales: TensorEntry  # F32, or the U8 codes of scales
    block: int
    inner_codebook: TensorEntry | None = None  # F32 [256]
    inner_scales: TensorEntry | None = None
    inner_block: int = 1
    offset: float = 0.0
    others: tuple[TensorEntry, ...] = ()

    precision = None

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        found = (self.codes, self.codebook, self.scales, self.inner_codebook, self.inner_scales)
        return (*(entry for entry in found if entry is not None), *self.others)

    @property
    def not_native(self) -> str:
        return "codes of a codebook"

    def floating(self, tensor: Open, start: int, stop: int) -> Array:
        """float32 [rows, k]."""
        k = self.shape[1]
        first, end = start * k, stop * k
        pairs = tensor(self.codes).reshape(-1).view(np.uint8)[first // 2 : -(-end // 2)]
        codes = np.stack((pairs >> 4, pairs & 15), axis=-1).reshape(-1)[first % 2 :][: end - first]
        blocks = np.arange(first // self.block, -(-end // self.block))
        scales = np.repeat(self._scales(tensor, blocks), self.block)[first - blocks[0] * self.block :][: end - first]
        weights: Array = (tensor(self.codebook)[codes] * scales).astype(np.float32)
        return weights.reshape(stop - start, k)

    def _scales(self, tensor: Open, blocks: Array) -> Array:
        """float64: those of some blocks."""
        stored = tensor(self.scales).reshape(-1)[blocks]
        if self.inner_codebook is None or self.inner_scales is None:
            return stored.astype(np.float64)
        inner = tensor(self.inner_scales).reshape(-1)[blocks // self.inner_block].astype(np.float64)
        scales: Array = tensor(self.inner_codebook)[stored] * inner + self.offset
        return scales


StoredLinear = IntegerLinear | ScaledLinear | CodebookLinear


def scaled(
    name: str,
    numbers: TensorEntry,
    scales: TensorEntry,
    block: tuple[int, int],
    model: str,
    others: tuple[TensorEntry, ...],
) -> ScaledLinear:
    """A ScaledLinear of [n, k] numbers whose scales have been checked to be one for each block. Raises UsageError."""
    n, k = numbers.shape
    blocks = (-(-n // block[0]), -(-k // block[1]))
    shapes = [blocks, *([(blocks[0],)] if blocks[1] == 1 else []), *([()] if blocks == (1, 1) else [])]
    expect(scales, SCALES, model, *shapes)
    return ScaledLinear(name, (n, k), numbers, scales, block, others=others)


def expect(entry: TensorEntry, types: tuple[str, ...], model: str, *shapes: tuple[int, ...]) -> TensorEntry:
    """`entry`, if it is of one of the types and shapes. Else UsageError."""
    if entry.type not in types or entry.shape not in shapes or math.prod(entry.shape) == 0:
        raise UsageError(
            f"{model}: {entry.name} is {entry.type} {list(entry.shape)}; by its quantization_config it should be "
            f"{' or '.join(types)} {' or '.join(map(str, map(list, shapes)))}"
        )
    return entry


def unordered_groups(entry: TensorEntry, k: int, group_size: int | None, model: str) -> TensorEntry | None:
    """`entry`, the group of each column, if they are not one group after the other. Else None. Raises UsageError."""
    groups = stored_array(expect(entry, ("I32",), model, (k,)))
    ordered = np.arange(k) // (group_size or k)
    if groups.max() > ordered[-1]:
        raise UsageError(f"{model}: {entry.name} names groups that there are not")
    return None if np.array_equal(groups, ordered) else entry
