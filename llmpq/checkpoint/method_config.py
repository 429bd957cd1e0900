"""What a quantization_config says, key by key: it is used, changes nothing, or is refused by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from llmpq.spec import UsageError
from llmpq.spec.ranges import shown


class MethodConfig:
    """A quantization_config, or an object within it. All errors are UsageErrors that name model and key."""

    def __init__(self, values: object, model: str, where: str = "quantization_config") -> None:
        self.model, self.where = model, where
        if not isinstance(values, dict):
            raise UsageError(f"{model}: its {where} is {shown(values)}, expected an object")
        self.values: Mapping[str, Any] = values

    def known(self, used: Collection[str], neutral: Collection[str], only: Mapping[str, tuple[Any, ...]]) -> None:
        """Check that it has no other keys, and those of `only` with one of these values (or null)."""
        for key, value in self.values.items():
            if key in only and value is not None and value not in only[key]:
                allowed = f"; only {' or '.join(map(str, only[key]))} is read" if only[key] else ""
                raise self.refusal(key, f"is not supported{allowed}")
            if value is not None and key not in (*used, *neutral, *only):
                raise self.refusal(key, "is not known; save the model in another form")

    def refusal(self, key: str, problem: str) -> UsageError:
        return UsageError(f"{self.model}: {key} = {shown(self.values.get(key))} in its {self.where} {problem}")

    def choice(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        """One of `choices`, text in lower case."""
        value = self.values.get(key)
        value = default if value is None else value.lower() if isinstance(value, str) else value
        if not any(type(value) is type(known) and value == known for known in choices):
            raise self.refusal(key, f"is not supported; {', '.join(map(str, choices))} are")
        return value

    def group_size(self, key: str = "group_size", default: int | None = None) -> int | None:
        """Columns of a group; None: the whole row (-1)."""
        value = self.values.get(key, default)
        if type(value) is not int or (value != -1 and not 1 <= value < 2**31):
            raise self.refusal(key, "is no group size")
        return None if value == -1 else value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            raise self.refusal(key, "is neither true nor false")
        return default if value is None else bool(value)


@functools.cache  # without a limit: the 512 that `re` keeps are fewer than a mixture's modules, tried in turn
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; of a broken one, that of no name."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return re.compile("(?!)")
