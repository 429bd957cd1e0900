"""Rows of a weight on their way to a device: in portions that suit it, read while the ones before are worked on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from llmpq.checkpoint.weights import Rows
from llmpq.quant import QuantTensor
from llmpq.quant.tensor import GPU_CHUNK

T = TypeVar("T")


def brought(rows: Iterator[Rows], device: torch.device) -> Iterator[Rows]:
    """`rows`, which are on the CPU, in order on the device. On a GPU they are read ahead, and in larger portions.

    What they become there is computed there. On a CPU they stay as they are: reading takes a core as computing does.
    """
    return rows if device.type == "cpu" else ahead(gathered(rows, device, GPU_CHUNK))


def gathered(portions: Iterable[Rows], device: torch.device, numbers: int) -> Iterator[Rows]:
    """Consecutive portions put together on a device, as far as they are of one kind and no more than `numbers`."""
    held: list[Rows] = []
    count = 0
    for rows in portions:
        size = math.prod(rows.shape)
        if held and (_kind(rows) != _kind(held[0]) or count + size > numbers):
            yield _together(held)
            held, count = [], 0
        held.append(rows.to(device))
        count += size
    if held:
        yield _together(held)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made by a thread while its predecessor is in use. What making one raises is raised here."""
    end = object()
    with ThreadPoolExecutor(1, "reader") as reader:
        following = reader.submit(next, items, end)
        while (item := following.result()) is not end:
            following = reader.submit(next, items, end)
            yield item  # type: ignore[misc]


def _kind(rows: Rows) -> object:
    return (rows.precision, rows.scales.dtype) if isinstance(rows, QuantTensor) else (rows.dtype, rows.shape[1:])


def _together(parts: Sequence[Rows]) -> Rows:
    """Parts of one kind as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if not isinstance(first, QuantTensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    packed = [part for part in parts if isinstance(part, QuantTensor)]
    qweight, scales = torch.cat([part.qweight for part in packed]), torch.cat([part.scales for part in packed])
    zeros = None if first.zeros is None else torch.cat([part.zeros for part in packed if part.zeros is not None])
    return QuantTensor(qweight, scales, zeros, first.precision, (len(qweight), first.shape[1]))
