"""Cluster: the devices a user has and the links between them, and the short form that describes devices in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from llmpq.spec.errors import UsageError
from llmpq.spec.precision import ActivationMode
from llmpq.spec.ranges import DeviceBytes, Index, Name, Parts, Price, Range, Seconds, Slowdown, shown
from llmpq.spec.record import InvalidField, Record, check, check_distinct

Isa = Literal["portable", "avx2", "avxvnni", "avx512", "amx"]  # in increasing width

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, slots=True)
class Device(Record):
    """One place that can run a stage: a GPU, or a CPU process with its own threads and instruction set."""

    name: Name
    kind: Literal["cpu", "cuda"]
    index: Index = 0  # of the GPU; 0 for a CPU
    threads: Parts = 1  # a GPU's process has at least so many, and a share of the cores that CPUs leave
    isa: Isa | None = None  # the widest instruction set it may use; None: the widest the machine has, but for amx
    memory_bytes: DeviceBytes | None = None  # cap above the idle worker process; None: what is free when it starts
    host: Name = "localhost"
    price_per_hour: Price = 0.0  # in any one currency, while it is in use
    slowdown: Slowdown = 1.0  # emulated: what it computes takes so many times as long as it really does
    members: Parts = 1  # equal devices that each compute a part of every unit; planned for on paper, never run

    def validate(self) -> None:
        check(self.kind == "cpu" or self.isa is None, "isa", "is set, but only a cpu has an instruction set to choose")

    def activations(self, wanted: ActivationMode) -> ActivationMode:
        """How this device multiplies quantized weights if CPUs do it in the mode `wanted`: GPUs have a16 alone."""
        return wanted if self.kind == "cpu" else "a16"


@dataclass(frozen=True, slots=True)
class Link(Record):
    """The way from one device to another: seconds = latency_s + bytes / bytes_per_s."""

    source: str
    target: str
    latency_s: Seconds
    bytes_per_s: Annotated[float, Range(1.0, 1e30)]
    emulated: bool = False  # messages are held back until they have taken so long

    def seconds(self, size: float) -> float:
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Cluster(Record):
    """All devices a plan may use. Links that are absent are measured."""

    SCHEMA = "llmpq.cluster/1"

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    def validate(self) -> None:
        check(len(self.devices) > 0, "devices", "is empty")
        names = [device.name for device in self.devices]
        check_distinct(names, "devices", ".name")
        known, expected = set(names), ", ".join(names)
        for i, link in enumerate(self.links):
            for end in ("source", "target"):
                name = getattr(link, end)
                check(name in known, f"links[{i}].{end}", f"is {shown(name)}, expected one of {expected}")
        check_links(self.links)

    def device(self, name: str) -> Device:
        """The device called `name`; KeyError if there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)


def check_links(links: Sequence[Link]) -> None:
    """Raise InvalidField if there are two links from one device to another."""
    check_distinct([(link.source, link.target) for link in links], "links")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as '90MiB', '1.5GiB' or '4096'. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or (match[2].lower() or "b") not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 90MiB or 4GiB")
    return int(Fraction(match[1][:40]) * _UNITS[match[2].lower() or "b"])


def _whole_number(text: str) -> int:
    if not text.isdecimal() or len(text) > 40:
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


_OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {  # of a device's short form -> field of Device
    "threads": ("threads", _whole_number),
    "isa": ("isa", str),
    "memory": ("memory_bytes", parse_bytes),
    "name": ("name", str),
    "host": ("host", str),
    "price": ("price_per_hour", _number),
    "slowdown": ("slowdown", _number),
}


def parse_devices(text: str) -> Cluster:
    """The cluster of a short form: devices apart by ';', each `cpu` or `cuda:INDEX`, options after it.

    `cpu:threads=1,isa=avx2,memory=90MiB;cuda:0,memory=4GiB`. Names are cpu0, cpu1, ... and cuda0, ... unless `name=` is
    given. Raises UsageError.
    """
    devices: list[Device] = []
    cpus = 0
    for part in filter(None, (p.strip() for p in text.split(";"))):
        kind, _, rest = part.partition(":")
        options = [o.strip() for o in rest.split(",") if o.strip()]
        index = 0
        if kind == "cuda":
            if options and options[0].isdecimal():
                index = int(options.pop(0))
        elif kind != "cpu":
            raise UsageError(f"--devices: {part!r} names no known kind of device; write cpu:... or cuda:INDEX,...")
        fields: dict[str, object] = {"kind": kind, "index": index, "name": f"cuda{index}"}
        if kind == "cpu":
            fields["name"] = f"cpu{cpus}"
            cpus += 1
        given: set[str] = set()
        for option in options:
            key, equals, value = option.partition("=")
            try:
                if not equals or not value:
                    raise ValueError(f"{option!r} is not of the form key=value")
                if key not in _OPTIONS:
                    raise ValueError(f"{key!r} is not an option; there are {', '.join(_OPTIONS)}")
                if key in given:
                    raise ValueError(f"{key!r} is given twice; write ';' between devices")
                given.add(key)
                field, convert = _OPTIONS[key]
                fields[field] = convert(value)
            except ValueError as error:
                raise UsageError(f"--devices: in {part!r}: {error}") from None
        try:
            devices.append(Device.from_dict(fields))
        except InvalidField as error:
            raise UsageError(f"--devices: in {part!r}: {error}") from None
    try:
        return Cluster(tuple(devices))
    except InvalidField as error:
        raise UsageError(f"--devices: {error}") from None
