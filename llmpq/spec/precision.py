"""Precision: how the weights of one linear are stored, as one identifier; and how a device multiplies them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from llmpq.spec.record import check

BITS = (3, 4, 8, 16)
GROUP_SIZES = (32, 64, 128, 256)
ZeroKind = Literal["sym", "asym", "offset"]  # the middle code; an integer; a floating offset. See quant/tensor.py
QUANTIZERS = ("rtn", "gptq", "gguf", "stored")  # see llmpq/quant; the last two are not made here
GIVEN = ("gguf", "stored")  # codes as a GGUF file, or a safetensors file of others, has them
CALIBRATED = ("gptq",)  # those that ask what goes into a linear
ActivationMode = Literal["a16", "a8x2", "a8"]  # exact; two int8 terms; one. See llmpq/quant/activations.py
ACTIVATION_MODES: tuple[ActivationMode, ...] = get_args(ActivationMode)
DEFAULT_ACTIVATIONS: ActivationMode = "a8x2"  # its error does not show in perplexity; hardly ever slower than a16
BLOCK = 32  # codes per packing block; see llmpq/quant/packing.py

_PATTERN = re.compile(r"w16|w(?P<bits>\d+)-g(?P<group>\d+|row)-(?P<zero>sym|asym|offset)-(?P<quantizer>\w+)")


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits, group size, kind of zero and quantizer. `str()` gives e.g. `w4-g64-sym-rtn`, or `w16`.

    16 bits means: not quantized, the model's own floating type; the other fields then keep their defaults.
    """

    bits: int
    group_size: int | None = None  # codes along k that share a scale; None: the whole row
    zero: ZeroKind = "sym"
    quantizer: str = "rtn"

    def __post_init__(self) -> None:
        check(self.bits in BITS, "bits", f"is {self.bits}, expected one of {BITS}")
        check(
            self.group_size is None or self.group_size in GROUP_SIZES,
            "group_size",
            f"is {self.group_size}, expected one of {GROUP_SIZES} or the whole row",
        )
        check(self.zero in get_args(ZeroKind), "zero", f"is {self.zero!r}, expected one of {get_args(ZeroKind)}")
        check(self.quantizer in QUANTIZERS, "quantizer", f"is {self.quantizer!r}, expected one of {QUANTIZERS}")
        check(
            self.bits != 16 or (self.group_size is None and self.zero == "sym" and self.quantizer == "rtn"),
            "bits",
            "is 16, which takes no group size, zero points or quantizer",
        )

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def calibrated(self) -> bool:
        """Whether its quantizer asks what goes into a linear."""
        return self.quantizer in CALIBRATED

    def multiplied(self, activations: ActivationMode) -> ActivationMode:
        """The mode in which a stage in the mode `activations` multiplies such weights: 16-bit ones always in a16."""
        return activations if self.quantized else "a16"

    @property
    def width(self) -> Width:
        return self.bits

    @property
    def layout(self) -> Precision:
        """All that kernels see, so that costs depend on it: this, whatever made the codes."""
        return self if self.quantizer == "rtn" else replace(self, quantizer="rtn")

    def __str__(self) -> str:
        if not self.quantized:
            return "w16"
        group = "row" if self.group_size is None else self.group_size
        return f"w{self.bits}-g{group}-{self.zero}-{self.quantizer}"

    @classmethod
    def parse(cls, text: str) -> Precision:
        """The inverse of `str()`. Raises ValueError."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"is {text!r}, expected a precision such as 'w4-g64-sym-rtn' or 'w16'")
        if match["bits"] is None:
            return cls(16)
        group = None if match["group"] == "row" else int(match["group"])
        return cls(int(match["bits"]), group, cast(ZeroKind, match["zero"]), match["quantizer"])

    def num_groups(self, k: int) -> int:
        """Scales per row of k weights."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] weight as stored: codes in whole blocks, 16-bit scales and offsets, 8-bit zero points."""
        if not self.quantized:
            return 2 * n * k
        codes = n * -(-k // BLOCK) * (BLOCK // 8) * self.bits
        return codes + n * self.num_groups(k) * {"sym": 2, "asym": 3, "offset": 4}[self.zero]


W16 = Precision(16)


@dataclass(frozen=True, slots=True)
class Native:
    """As the checkpoint stores it: linears in precisions that kernels read where they are so, others in 16 bits."""

    @property
    def quantized(self) -> bool:
        return True

    @property
    def width(self) -> Width:
        return self

    @property
    def layout(self) -> Native:
        return self

    def __str__(self) -> str:
        return "native"

    @classmethod
    def parse(cls, text: str) -> Native:
        """The inverse of `str()`. Raises ValueError."""
        if text != "native":
            raise ValueError(f"is {text!r}, expected 'native'")
        return cls()


@dataclass(frozen=True, slots=True)
class Mixed:
    """A quantized precision, or native, for each fused linear of a decoder layer.

    `str()`: e.g. `qkv:w4-g64-sym-rtn,out:native,...`.
    """

    linears: tuple[tuple[str, Native | Precision], ...]  # as ModelSpec.linears("layer.0") names them, in its order

    def __post_init__(self) -> None:
        for name, precision in self.linears:
            check(precision.quantized, name, "is w16, expected a quantized precision")

    @property
    def quantized(self) -> bool:
        return True

    @property
    def width(self) -> str:
        """The widths of all linears, in order: as `4/3/native/4`."""
        return "/".join(str(precision.width) for _, precision in self.linears)

    @property
    def layout(self) -> Mixed:
        """Of all linears; see `Precision.layout`."""
        return Mixed(tuple((name, precision.layout) for name, precision in self.linears))

    def __str__(self) -> str:
        return ",".join(f"{name}:{precision}" for name, precision in self.linears)

    @classmethod
    def parse(cls, text: str) -> Mixed:
        """The inverse of `str()`. Raises ValueError."""
        pairs = [part.partition(":") for part in text.split(",")]
        native = str(NATIVE)
        return cls(tuple((name, NATIVE if of == native else Precision.parse(of)) for name, _, of in pairs))


NATIVE = Native()
UnitPrecision = Native | Mixed | Precision
Width = Native | int  # what is chosen of a unit's precision: bits, or native
WIDTHS: tuple[Width, ...] = (*BITS, NATIVE)


def widths_of(option: UnitPrecision) -> tuple[Width, ...]:
    """The widths of a unit's linears: of a mixed one each of its own, else one."""
    return tuple(of.width for _, of in option.linears) if isinstance(option, Mixed) else (option.width,)
