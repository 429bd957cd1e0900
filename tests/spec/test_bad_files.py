"""Files of plans, clusters, costs and sensitivities that others damaged: one line that names file, row and field."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from llmpq.spec import (
    W16,
    Cluster,
    CostRow,
    CostTable,
    Device,
    InvalidField,
    Link,
    Op,
    Plan,
    Precision,
    Profile,
    Record,
    Sensitivity,
    Solved,
    UsageError,
    Workload,
    load_either,
    parse_devices,
)
from llmpq.spec.record import _fields

ROWS = (CostRow(Op("step"), 1e-3, "cpu", "float32", 0), CostRow(Op("linear", 1, 8, 8, 0.0, W16), 1e-3, "cpu", "f", 0))
RECORDS: dict[str, Record] = {
    "cluster": Cluster(
        (Device("a", "cpu", memory_bytes=2**30), Device("b", "cpu")),
        (Link("a", "b", 0.0, 1e9), Link("b", "a", 0.0, 1e9)),
    ),
    "costs": Profile({"a": CostTable("a", "none", 1, None, 0, ROWS)}, (Link("a", "b", 0.0, 1e9),)),
    "sensitivity": Sensitivity("m", "h", "variance", "t", {"embedding": {"w4-g32-sym-rtn": 0.5}}),
}
INF, NAN = float("inf"), float("nan")


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize(
    ("name", "path", "new", "message"),
    [
        *(
            ("cluster", ("devices", 1, field), value, f"devices[1].{field}: is {value}, expected ")
            for field, values in {
                "memory_bytes": (0, 1, -1, 2**63),
                "threads": (0, -1, 10**6),
                "price_per_hour": (NAN, INF, -1.0, 1e300),
                "slowdown": (NAN, INF, 0.0, -1.0, 1e300),
                "members": (0, 10**9),
                "index": (-1,),
            }.items()
            for value in values
        ),
        (
            "cluster",
            ("devices", 0, "memory_bytes"),
            10**30,
            "devices[0].memory_bytes: is 1000000000000000000000000000000",
        ),
        ("cluster", ("devices", 0, "threads"), True, "devices[0].threads: is True, expected int"),
        ("cluster", ("devices", 1, "name"), "a", "devices[1].name: is 'a', which an earlier one has"),
        ("cluster", ("devices", 1, "name"), "b\x1b[2J", r"devices[1].name: is 'b\x1b[2J', expected characters"),
        ("cluster", ("devices", 1, "host"), "", "devices[1].host: is empty"),
        ("cluster", ("devices", 1, "host"), "\ud800", r"devices[1].host: is '\ud800', with half of a surrogate pair"),
        ("cluster", ("links", 1, "source"), "c", "links[1].source: is 'c', expected one of a, b"),
        (
            "cluster",
            ("links", 1),
            {"source": "a", "target": "b", "latency_s": 0.0, "bytes_per_s": 1.0},
            "links[1]: is (",
        ),
        ("costs", ("links", 0, "latency_s"), NAN, "links[0].latency_s: is nan, expected 0 to 1e+09"),
        ("costs", ("links", 0, "bytes_per_s"), 0, "links[0].bytes_per_s: is 0.0, expected 1 to 1e+30"),
        ("costs", ("tables", "a", "rows", 1, "seconds"), INF, "tables['a'].rows[1].seconds: is inf, expected 0 to"),
        ("costs", ("tables", "a", "rows", 1, "seconds"), NAN, "tables['a'].rows[1].seconds: is nan, expected 0 to"),
        ("costs", ("tables", "a", "rows", 1, "seconds"), 1e300, "tables['a'].rows[1].seconds: is 1e+300, expected 0"),
        (
            "costs",
            ("tables", "a", "rows", 1, "seconds"),
            1e-300,
            "tables['a'].rows[1].seconds: is 1e-300, expected 0",
        ),
        ("costs", ("tables", "a", "rows", 1, "seconds"), -1e-9, "tables['a'].rows[1].seconds: is -1e-09, expected 0"),
        ("costs", ("tables", "a", "rows", 1, "op", "m"), -1, "tables['a'].rows[1].op.m: is -1, expected 0 to"),
        ("costs", ("tables", "a", "rows", 1, "op", "context"), NAN, "tables['a'].rows[1].op.context: is nan"),
        (
            "costs",
            ("tables", "a", "rows", 1),
            {**ROWS[0].to_dict(), "seconds": 2},
            "tables['a'].rows[1].seconds: is 2.0, but 0.001 in",
        ),
        ("costs", ("tables", "a", "overhead_bytes"), -1, "tables['a'].overhead_bytes: is -1, expected 0 to"),
        ("costs", ("tables", "a", "scale"), 0.0, "tables['a'].scale: is 0.0, expected more than 0"),
        ("costs", ("tables", "a", "message_s"), INF, "tables['a'].message_s: is inf"),
        ("sensitivity", ("omega", "embedding", "w4-g32-sym-rtn"), NAN, "omega['embedding']['w4-g32-sym-rtn']: is nan"),
        ("sensitivity", ("omega", "embedding", "w4-g32-sym-rtn"), -1, "omega['embedding']['w4-g32-sym-rtn']: is -1.0"),
        ("sensitivity", ("omega", "embedding"), "x" * 5000, "omega['embedding']: is 'xxxx"),
        ("sensitivity", ("omega", "y" * 5000), "x", "omega['yyyy"),
        ("sensitivity", ("omega",), 10**4000, "omega: is a whole number of 13288 bits, expected an object"),
    ],
)
def test_a_number_out_of_range_is_named_by_file_row_and_field(
    tmp_path: Path, name: str, path: tuple[Any, ...], new: Any, message: str
) -> None:
    record, file = RECORDS[name], tmp_path / f"{name}.json"
    record.save(file)
    assert type(record).load(file) == record
    file.write_text(json.dumps(put(record.to_dict(), path, new)))
    with pytest.raises(UsageError) as caught:
        type(record).load(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert len(str(caught.value)) <= 500


CLUSTER = json.dumps(RECORDS["cluster"].to_dict())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": ' * 100_000, "is nested too deeply"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", "cannot be read: Exceeds the limit"),
        (CLUSTER.replace('"index": 0', '"index": 0, "index": 1', 1).encode(), "an object has the key 'index' twice"),
        (CLUSTER.encode("cp500"), "is not JSON"),
        (CLUSTER.encode()[:-9], "is not JSON: "),
        (b"\0" * 100, "is not JSON"),
        (b'{"schema": "llmpq.cluster/1"', "is not JSON: Expecting"),
        (b'{"schema": 1e999, "devices": []}', "schema: is inf; this version of llmpq reads"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(data)
    for load in (Cluster.load, lambda path: load_either(path, Solved, Plan)):
        with pytest.raises(UsageError) as caught:
            load(file)
        if load == Cluster.load or "schema" not in message:
            assert str(file) in str(caught.value) and message in str(caught.value)
        assert len(str(caught.value)) <= 500 and str(caught.value).isprintable()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_files_of_other_editors_are_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(CLUSTER.encode(encoding))
    assert Cluster.load(file) == RECORDS["cluster"]


def test_what_is_no_file_is_refused_and_nothing_waits(tmp_path: Path) -> None:
    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    began = time.monotonic()
    for path, message in {
        tmp_path: "it is a folder, no file",
        Path("/dev/zero"): "it is a device, no file",
        loop: "Too many levels of symbolic links",
        pipe: "is empty",
        tmp_path / ("x" * 300): "File name too long",
        Path("a\0b"): "embedded null",
    }.items():
        with pytest.raises(UsageError, match=message):
            Cluster.load(path)
    assert time.monotonic() - began < 2


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, CLUSTER.encode())
    os.close(write)
    assert Cluster.load(f"/dev/fd/{read}") == RECORDS["cluster"]
    os.close(read)


def test_what_a_program_gives_is_checked_as_what_a_file_holds() -> None:
    for make in (
        lambda: Workload(2.5, 8, 8),  # type: ignore[arg-type]
        lambda: Workload(8, 8, 10**30),
        lambda: Device("a", "tpu"),  # type: ignore[arg-type]
        lambda: Device("a", "cpu", memory_bytes="4GiB"),  # type: ignore[arg-type]
        lambda: Sensitivity("m", "h", "v", "t", {"head": {str(Precision(4)): NAN}}),
        lambda: parse_devices("cpu:memory=" + "9" * 400 + "GiB"),
        lambda: parse_devices("cpu:threads=" + "9" * 5000),
        lambda: parse_devices("cuda:²"),
    ):
        with pytest.raises(UsageError):
            make()


def test_every_record_has_its_numbers_checked() -> None:
    """Its own conditions are in `validate`: a `__post_init__` would take the place of the one that checks fields."""

    def below(cls: type[Record]) -> list[type[Record]]:
        return [cls, *(deeper for child in cls.__subclasses__() for deeper in below(child))]

    for cls in below(Record):
        assert cls.__post_init__ is Record.__post_init__, cls
    with pytest.raises(InvalidField, match=r"^scale: is nan, expected more than 0"):
        CostTable("a", "none", 1, None, 0, (), scale=NAN)
    assert set(_fields(Link)) == {"source", "target", "latency_s", "bytes_per_s", "emulated"}
