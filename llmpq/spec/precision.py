"""Precision: how the weights of one linear are stored and multiplied, as one identifier."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llmpq.spec.record import check

BITS = (3, 4, 8, 16)
GROUP_SIZES = (32, 64, 128, 256)
QUANTIZERS = ("rtn",)
ACTIVATION_MODES = ("a16", "a8x2", "a8")  # exact; two int8 terms; one. See llmpq/quant/activations.py
DEFAULT_ACTIVATIONS = "a8x2"  # perplexity does not show its error, and it is hardly ever slower than a16
BLOCK = 32  # codes per packing block; see llmpq/quant/packing.py

_PATTERN = re.compile(r"w16|w(?P<bits>\d+)-g(?P<group>\d+|row)-(?P<zero>sym|asym)-(?P<quantizer>\w+)-(?P<act>\w+)")


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits, group size, symmetry, quantizer and activation mode. `str()` gives e.g. `w4-g64-sym-rtn-a16`, or `w16`.

    16 bits means: not quantized, the model's own floating type; the other fields then keep their defaults.
    """

    bits: int
    group_size: int | None = None  # codes along k that share a scale; None: the whole row
    symmetric: bool = True
    quantizer: str = "rtn"
    activations: str = "a16"

    def __post_init__(self) -> None:
        check(self.bits in BITS, "bits", f"is {self.bits}, expected one of {BITS}")
        check(
            self.group_size is None or self.group_size in GROUP_SIZES,
            "group_size",
            f"is {self.group_size}, expected one of {GROUP_SIZES} or the whole row",
        )
        check(self.quantizer in QUANTIZERS, "quantizer", f"is {self.quantizer!r}, expected one of {QUANTIZERS}")
        check(
            self.activations in ACTIVATION_MODES,
            "activations",
            f"is {self.activations!r}, expected one of {ACTIVATION_MODES}",
        )
        check(
            self.bits != 16 or (self.group_size is None and self.symmetric and self.quantizer == "rtn"),
            "bits",
            "is 16, which takes no group size, zero points or quantizer",
        )
        check(
            self.bits != 16 or self.activations == "a16",
            "activations",
            f"is {self.activations!r}, but 16-bit weights are always multiplied in a16",
        )

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def stored(self) -> Precision:
        """What the weights themselves depend on: this, without how they are multiplied."""
        return replace(self, activations="a16")

    def on(self, kind: str, activations: str) -> Precision:
        """This as a device of `kind` multiplies it, where CPUs are to use `activations`: GPUs have a16 alone."""
        return replace(self, activations=activations if kind == "cpu" and self.quantized else "a16")

    def __str__(self) -> str:
        if not self.quantized:
            return "w16"
        group = "row" if self.group_size is None else self.group_size
        return f"w{self.bits}-g{group}-{'sym' if self.symmetric else 'asym'}-{self.quantizer}-{self.activations}"

    @classmethod
    def parse(cls, text: str) -> Precision:
        """The inverse of `str()`. Raises ValueError."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"is {text!r}, expected a precision such as 'w4-g64-sym-rtn-a16' or 'w16'")
        if match["bits"] is None:
            return cls(16)
        group = None if match["group"] == "row" else int(match["group"])
        return cls(int(match["bits"]), group, match["zero"] == "sym", match["quantizer"], match["act"])

    def num_groups(self, k: int) -> int:
        """Scales per row of k weights."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] weight as stored: codes packed in whole blocks, 16-bit scales, 8-bit zero points."""
        if not self.quantized:
            return 2 * n * k
        codes = n * -(-k // BLOCK) * (BLOCK // 8) * self.bits
        return codes + n * self.num_groups(k) * (2 if self.symmetric else 3)


W16 = Precision(16)
