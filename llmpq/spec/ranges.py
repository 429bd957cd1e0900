"""What numbers and names may be: declared once, in the annotations of fields, which records check (record.py).

A limit is generous: far beyond any machine, model or measurement, and within what solvers and processes can take.
"""

from __future__ import annotations

import re
import reprlib
import sys
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any

LARGEST = 2**63 - 1  # of whole numbers without a range of their own

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2
_SURROGATE = re.compile("[\ud800-\udfff]")


def shown(value: Any) -> str:
    """A value as a message shows it: in at most some hundred characters."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a whole number of {value.bit_length()} bits"
    return _SHORT.repr(value)


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `least` to `most`, both included; without `least` if `above`. Only a limit may be infinite."""

    least: float
    most: float
    above: bool = False

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        if self == FINITE:
            return "a finite number"
        if self.above:
            return f"more than {self.least:g}" + ("" if self.most == inf else f", at most {self.most:g}")
        return f"{self.least:g} or more" if self.most == inf else f"{_number(self.least)} to {_number(self.most)}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


@dataclass(frozen=True, slots=True)
class Printable:
    """Text that is not empty and has no character that a terminal would obey or cannot show."""


def is_encodable(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can hold and no file."""
    return _SURROGATE.search(text) is None


WHOLE = Range(-LARGEST, LARGEST)
FINITE = Range(-sys.float_info.max, sys.float_info.max)

Count = Annotated[int, Range(1, 10**9)]
Index = Annotated[int, Range(0, 10**9)]  # also of what may be absent
Layers = Annotated[int, Range(1, 10_000)]  # a list of as many units takes no time
Size = Annotated[int, Range(1, 2**31 - 1)]  # of a tensor's axis
Parts = Annotated[int, Range(1, 4096)]  # threads, or devices that share a stage
Bytes = Annotated[int, Range(0, 2**60)]
DeviceBytes = Annotated[int, Range(4096, 2**60)]  # at least a page
Seconds = Annotated[float, Range(0.0, 1e9)]
Duration = Annotated[float, Range(0.0, 1e30)]  # seconds of many steps
Rate = Annotated[float, Range(0.0, 1e30)]  # of anything, per second
Total = Annotated[int, Range(0, LARGEST)]  # bytes of all that a stage holds
Sequences = Annotated[int, Range(1, 10**7)]
Share = Annotated[float, Range(0.0, 1.0)]
Omega = Annotated[float, Range(0.0, 1e9)]
Price = Annotated[float, Range(0.0, 1e9)]
Positive = Annotated[float, Range(0.0, 1e30, above=True)]
Factor = Annotated[float, Range(0.0, 1e6, above=True)]
Slowdown = Annotated[float, Range(1.0, 1e6)]
Number = Annotated[float, Range(0.0, sys.float_info.max)]
Portion = Annotated[float, Range(0.0, 1.0, above=True)]
Choices = Annotated[int, Range(1, 1000)]
Seed = Annotated[int, Range(0, LARGEST)]
Name = Annotated[str, Printable()]
