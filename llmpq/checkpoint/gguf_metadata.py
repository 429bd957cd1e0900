"""The metadata of a GGUF file that is its architecture's own: what is read is taken from it, the rest is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmpq.spec import UsageError
from llmpq.spec.ranges import shown


class OwnMetadata:
    """Values by their keys without the "<architecture>." before them. Errors are UsageErrors with the whole key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, name: str) -> None:
        self.name, self._prefix = name, f"{architecture}."
        self._values: dict[str, Any] = {
            key.removeprefix(self._prefix): value for key, value in metadata.items() if key.startswith(self._prefix)
        }

    def _one(self, key: str) -> Any:
        """The value of a key that is there, where it may stand once for each layer."""
        value = self._values[key]
        if value is None or isinstance(value, tuple):
            if not value or any(other != value[0] for other in value):
                raise UsageError(
                    f"{self.name}: {self._prefix}{key} = {shown(value)} is not supported; expected one value for all "
                    "layers"
                )
            return value[0]
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        return self._one(key) if key in self else None

    def take(self, key: str, default: Any = None) -> Any:
        value = self._one(key) if key in self else default
        self._values.pop(key, None)
        return value

    def take_number(self, key: str, default: Any = None) -> Any:
        """A finite number of 0 or more, or what is true or false."""
        value = self.take(key, default)
        if type(value) not in (int, float, bool) or not math.isfinite(value) or value < 0:
            raise UsageError(f"{self.name}: {self._prefix}{key} = {shown(value)} is no number above 0")
        return value

    def missing(self, key: str, beside: str = "") -> UsageError:
        """The error that a key is not there, `beside` another one that asks for it."""
        also = f" beside {self._prefix}{beside} = {shown(self._values.get(beside))}" if beside else ""
        return UsageError(f"{self.name}: it has no {self._prefix}{key}{also}")

    def check(self, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        """Raise UsageError if a value is none of those that are."""
        if value not in allowed:
            only = f", only {' or '.join(map(shown, allowed))}" if allowed else ""
            raise UsageError(f"{self.name}: {self._prefix}{key} = {shown(value)} is not supported{only}")

    def check_rest(self, neutral: Mapping[str, tuple[Any, ...] | None]) -> None:
        """Raise UsageError for a key that was not taken and has none of its neutral values; None: all are."""
        for key in self._values:
            if (allowed := neutral.get(key, ())) is not None:
                self.check(key, self._one(key), allowed)
