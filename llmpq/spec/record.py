"""JSON for frozen dataclasses: an exact round trip, and errors that name the field.

A class that derives from `Record` gets `to_dict`, `from_dict`, `save` and `load`. Its annotations are the format: int,
float, str, bool, `X | None`, `X | Y` (the first that fits; an error is that of the last), `tuple[X, ...]`,
`dict[str, X]`, `Literal`, other records, and classes with `parse(str)` whose `str()` is the JSON form. A class with
`SCHEMA` writes it and refuses any other. Values are checked by `check` as they are made, so a record that exists is a
valid one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llmpq.spec.errors import UsageError

R = TypeVar("R", bound="Record")
S = TypeVar("S", bound="Record")


class InvalidField(ValueError):
    """A value that breaks its record's rules. `path` names the field, outermost first, as in `stages[1].bits[3]`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path, self.problem = path, problem

    def inside(self, outer: str) -> InvalidField:
        """The same complaint as seen from the record or list that holds the field."""
        separator = "" if self.path.startswith("[") else "."
        return InvalidField(outer + separator + self.path, self.problem)


def check(condition: bool, path: str, problem: str) -> None:
    """Raise InvalidField unless `condition`; used in `__post_init__`."""
    if not condition:
        raise InvalidField(path, problem)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, required) of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {
        f.name: (hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(cls)
    }


def _decode(kind: Any, value: Any) -> Any:
    """`value`, as JSON gave it, as an instance of the annotation `kind`. Raises InvalidField with the path to it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = (a for a in arguments if a is not type(None))
        for other in others:
            with suppress(InvalidField):
                return _decode(other, value)
        return _decode(last, value)
    if origin is Literal:
        check(value in arguments, "", f"is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        check(isinstance(value, list), "", f"is {value!r}, expected a list")
        open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
        check(open_ended or len(value) == len(arguments), "", f"has {len(value)} entries, expected {len(arguments)}")
        kinds = [arguments[0]] * len(value) if open_ended else arguments
        return tuple(_decode_at(f"[{i}]", k, v) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        check(isinstance(value, dict), "", f"is {value!r}, expected an object")
        return {key: _decode_at(f"[{key!r}]", arguments[1], v) for key, v in value.items()}
    if dataclasses.is_dataclass(kind) and not hasattr(kind, "parse"):
        return _decode_record(kind, value)
    if hasattr(kind, "parse"):
        check(isinstance(value, str), "", f"is {value!r}, expected a string")
        try:
            return kind.parse(value)
        except ValueError as error:
            raise InvalidField("", str(error)) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    check(type(value) is kind, "", f"is {value!r}, expected {kind.__name__}")
    return value


def _decode_at(path: str, kind: Any, value: Any) -> Any:
    try:
        return _decode(kind, value)
    except InvalidField as error:
        if error.path:
            raise error.inside(path) from None
        raise InvalidField(path, error.problem) from None


def _decode_record(cls: Any, value: Any) -> Any:
    check(isinstance(value, dict), "", f"is {value!r}, expected an object")
    schema = getattr(cls, "SCHEMA", None)
    if schema is not None:
        found = value.get("schema")
        check(found == schema, "schema", f"is {found!r}; this version of llmpq reads {schema!r}")
        value = {key: v for key, v in value.items() if key != "schema"}
    fields = _fields(cls)
    for key in value:
        check(key in fields, key, f"is not a field of {cls.__name__}")
    for name, (_, required) in fields.items():
        check(name in value or not required, name, "is missing")
    return cls(**{name: _decode_at(name, fields[name][0], v) for name, v in value.items()})


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not hasattr(value, "parse"):
        record = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        schema = getattr(value, "SCHEMA", None)
        return record if schema is None else {"schema": schema, **record}
    if isinstance(value, (tuple, list)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {key: _encode(v) for key, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


class Record:
    """Base of the frozen dataclasses that pass between the parts of llmpq."""

    __slots__ = ()
    SCHEMA: ClassVar[str | None] = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` of it equals self."""
        encoded: dict[str, Any] = _encode(self)
        return encoded

    @classmethod
    def from_dict(cls: type[R], value: Any) -> R:
        """The record that `to_dict` described. Raises InvalidField, naming the field."""
        record: R = _decode_record(cls, value)
        return record

    def digest(self) -> str:
        """16 hex digits that change with any field."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote. Raises UsageError naming the file and the field."""
        return load_either(path, cls, cls)


def load_either(path: str | Path, kind: type[R], other: type[S]) -> R | S:
    """The record in a file that may hold one of two kinds, told apart by their schema.

    Raises UsageError naming the file and the field.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = str(value.get("schema")) if isinstance(value, dict) else ""
        is_other = schema.partition("/")[0] == str(other.SCHEMA).partition("/")[0]  # in any version
        return other.from_dict(value) if is_other else kind.from_dict(value)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    except InvalidField as error:
        raise UsageError(f"{path}: {error}") from None
