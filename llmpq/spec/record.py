"""JSON for frozen dataclasses: an exact round trip, and errors that name the field.

A class that derives from `Record` gets `to_dict`, `from_dict`, `save` and `load`. Its annotations are the format: int,
float, str, bool, `X | None`, `X | Y` (the first that fits; an error is that of the last), `tuple[X, ...]`, `dict[str,
X]`, `dict[int, X]`, `Literal`, other records, and classes with `parse(str)` whose `str()` is the JSON form. A class
with `SCHEMA` writes it and refuses any other. They are also the rules, whether a value comes from a file or from a
program: numbers lie in the range that is declared with them (ranges.py) and are finite, and a Literal is one of its
values. What must hold between fields is for `validate`. So a record that exists is a valid one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llmpq.spec.errors import UsageError
from llmpq.spec.files import write_text
from llmpq.spec.json_file import read_json
from llmpq.spec.ranges import FINITE, WHOLE, Printable, Range, is_encodable, shown

R = TypeVar("R", bound="Record")
S = TypeVar("S", bound="Record")


class InvalidField(UsageError, ValueError):
    """A value that breaks its record's rules. `path` names the field, outermost first, as in `stages[1].bits[3]`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path, self.problem = path, problem

    def inside(self, outer: str) -> InvalidField:
        """The same complaint as seen from the record or list that holds the field."""
        separator = "." if self.path and not self.path.startswith("[") else ""
        return InvalidField(outer + separator + self.path, self.problem)


def check(condition: bool, path: str, problem: str) -> None:
    """Raise InvalidField unless `condition`; used in `validate`."""
    if not condition:
        raise InvalidField(path, problem)


def check_distinct(values: Iterable[Any], path: str, last: str = "") -> None:
    """Raise InvalidField if a value comes twice; `path` is that of their list, `last` what follows an index."""
    seen = set()
    for i, value in enumerate(values):
        check(value not in seen, f"{path}[{i}]{last}", f"is {shown(value)}, which an earlier one has")
        seen.add(value)


_Check = Callable[[Any], None]


@functools.cache
def _checks(cls: Any) -> list[tuple[str, _Check]]:
    """The fields of a dataclass that have a rule, and what checks it."""
    checks = ((name, _check_of(kind)) for name, (kind, _) in _fields(cls).items())
    return [(name, rule) for name, rule in checks if rule is not None]


def _check_of(kind: Any) -> _Check | None:
    """What raises InvalidField for a value that breaks the rule of an annotation; None if it has no rule."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        plain, rule = arguments
        return _printable if isinstance(rule, Printable) else functools.partial(_in_range, plain, rule)
    if kind is float or kind is int:
        return functools.partial(_in_range, kind, FINITE if kind is float else WHOLE)
    if kind is str:
        return _text
    if origin is Literal:
        return lambda value: check(value in arguments, "", _not_one_of(value, arguments))
    if origin in (Union, types.UnionType):
        inner = [_check_of(argument) for argument in arguments if argument is not type(None)]
        return None if inner[1:] or inner[0] is None else functools.partial(_unless_none, inner[0])
    if origin is tuple:
        each = _check_of(arguments[0])
        return None if each is None else lambda values: _check_items(each, enumerate(values))
    if origin in (dict, Mapping):
        key_rule, value_rule = map(_check_of, arguments)
        return functools.partial(_check_mapping, key_rule, value_rule)
    return None


def _in_range(kind: type, rule: Range, value: Any) -> None:
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not number or value not in rule:
        whole = " as a whole number" if kind is int and isinstance(value, float) else ""
        raise InvalidField("", f"is {shown(value)}, expected {rule}{whole}")


def _text(value: Any) -> None:
    check(isinstance(value, str), "", f"is {shown(value)}, expected str")
    check(is_encodable(value), "", f"is {shown(value)}, with half of a surrogate pair")


def _printable(value: Any) -> None:
    _text(value)
    check(value != "", "", "is empty")
    check(value.isprintable(), "", f"is {shown(value)}, expected characters that can be printed")


def _unless_none(rule: _Check, value: Any) -> None:
    if value is not None:
        rule(value)


def _check_items(rule: _Check, items: Iterable[tuple[Any, Any]]) -> None:
    for key, value in items:
        try:
            rule(value)
        except InvalidField as error:
            raise error.inside(f"[{shown(key)}]") from None


def _check_mapping(key_rule: _Check | None, value_rule: _Check | None, mapping: Mapping[Any, Any]) -> None:
    if key_rule is not None:
        _check_items(key_rule, zip(mapping, mapping))
    if value_rule is not None:
        _check_items(value_rule, mapping.items())


def _check_at(path: str, rule: _Check, value: Any) -> None:
    try:
        rule(value)
    except InvalidField as error:
        raise error.inside(path) from None


def _not_one_of(value: Any, expected: tuple[Any, ...]) -> str:
    return f"is {shown(value)}, expected one of {', '.join(map(repr, expected))}"


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, required) of the fields of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        f.name: (hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(cls)
    }


def _decode(kind: Any, value: Any) -> Any:
    """`value`, as JSON gave it, as an instance of the annotation `kind`. Raises InvalidField with the path to it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _decode(arguments[0], value)  # its rule is checked where the record is made
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = (a for a in arguments if a is not type(None))
        for other in others:
            with suppress(InvalidField):
                return _decode(other, value)
        return _decode(last, value)
    if origin is Literal:
        check(value in arguments, "", _not_one_of(value, arguments))
        return value
    if origin is tuple:
        check(isinstance(value, list), "", f"is {shown(value)}, expected a list")
        open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
        check(open_ended or len(value) == len(arguments), "", f"has {len(value)} entries, expected {len(arguments)}")
        kinds = [arguments[0]] * len(value) if open_ended else arguments
        return tuple(_decode_at(f"[{i}]", k, v) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping):
        check(isinstance(value, dict), "", f"is {shown(value)}, expected an object")
        return {
            _decode_key(arguments[0], key): _decode_at(f"[{shown(key)}]", arguments[1], v) for key, v in value.items()
        }
    if dataclasses.is_dataclass(kind) and not hasattr(kind, "parse"):
        return _decode_record(kind, value)
    if hasattr(kind, "parse"):
        check(isinstance(value, str), "", f"is {shown(value)}, expected a string")
        try:
            return kind.parse(value)
        except ValueError as error:
            raise InvalidField("", str(error)) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        check(value in FINITE, "", f"is {shown(value)}, expected {FINITE}")
        return float(value)
    check(type(value) is kind, "", f"is {shown(value)}, expected {kind.__name__}")
    return value


def _decode_key(kind: Any, key: Any) -> Any:
    """A key of an object as one of a mapping: JSON has whole numbers as texts there."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    whole = plain is int and isinstance(key, str) and re.fullmatch("0|-?[1-9][0-9]{,18}", key)
    return int(key) if whole else key


def _decode_at(path: str, kind: Any, value: Any) -> Any:
    try:
        return _decode(kind, value)
    except InvalidField as error:
        raise error.inside(path) from None


def _decode_record(cls: Any, value: Any) -> Any:
    check(isinstance(value, dict), "", f"is {shown(value)}, expected an object")
    schema = getattr(cls, "SCHEMA", None)
    if schema is not None:
        found = value.get("schema")
        check(found == schema, "schema", f"is {shown(found)}; this version of llmpq reads {schema!r}")
        value = {key: v for key, v in value.items() if key != "schema"}
    fields = _fields(cls)
    for key in value:
        check(key in fields, shown(key).strip("'"), f"is not a field of {cls.__name__}")
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
        return {str(key): _encode(v) for key, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


class Record:
    """Base of the frozen dataclasses that pass between the parts of llmpq."""

    __slots__ = ()
    SCHEMA: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        cls: Any = type(self)
        self.normalize()
        for name, rule in _checks(cls):
            _check_at(name, rule, getattr(self, name))
        self.validate()

    def normalize(self) -> None:
        """Give fields the form that they have, where callers may write another; before they are checked."""

    def validate(self) -> None:
        """Raise InvalidField if fields that are valid each by itself are not so together."""

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
        """Write as JSON, as `write_text` does. Raises UsageError."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote. Raises UsageError naming the file and the field."""
        return load_either(path, cls, cls)


def load_either(path: str | Path, kind: type[R], other: type[S]) -> R | S:
    """The record in a file that may hold one of two kinds, told apart by their schema.

    Raises UsageError naming the file and the field.
    """
    value = read_json(path)
    schema = shown(value.get("schema")).strip("'") if isinstance(value, dict) else ""
    is_other = schema.partition("/")[0] == str(other.SCHEMA).partition("/")[0]  # in any version
    try:
        return other.from_dict(value) if is_other else kind.from_dict(value)
    except InvalidField as error:
        raise UsageError(f"{path}: {error}") from None
