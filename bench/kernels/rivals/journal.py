"""A result file that grows cell by cell, so that measuring goes on where it was stopped, whatever stopped it.

A contender may end the process, or never come back. So for as long as one is at work, its name is in a second file,
FILE.at_work. Who finds a name there knows what happened; that contender is not asked again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from bench.kernels.rivals.measure_gpu import Cell
from bench.machine import write_results

ENDED = "ended the process, or never came back"
_IN_TURN = "all in turn"  # what stands for a contender where several were timed
_PLACE = ("n", "k", "m", "dtype")


def is_same_run(old: dict[str, Any], head: dict[str, Any]) -> bool:
    """Whether what was found then holds now: on the same device, of the same commit."""
    return all(old.get(key) == head[key] for key in ("device", "commit"))


class Journal:
    """`results` is what the file holds: the head, ceilings, what is missing, cells and rows."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path = path
        self.results = head | {"ceilings": {}, "ended": {}, "missing": {}, "cells": [], "rows": []}
        if path is not None and path.exists():
            old = json.loads(path.read_text())
            if is_same_run(old, head):
                self.results = self.results | old | head
        self._mark = None if path is None else Path(f"{path}.at_work")
        if self._mark is not None and self._mark.exists():
            self._blame(json.loads(self._mark.read_text()))
            self.rest()

    @property
    def is_at_work(self) -> bool:
        """Whether the file says that somebody is."""
        return self._mark is not None and self._mark.exists()

    def at_work(self, place: dict[str, Any], contender: str | None) -> None:
        """Note who may end the process, and in which cell (none: while importing); None: several in turn."""
        if self._mark is not None:
            self._mark.write_text(json.dumps(place | {"contender": contender}))

    def rest(self) -> None:
        """Nobody is at work."""
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)

    def _blame(self, note: dict[str, Any]) -> None:
        contender = note.pop("contender")
        if contender is None:
            self.results["cells"].append(note | {"timed": [], "missing": {_IN_TURN: ENDED}})
        else:
            self.results["ended"][contender] = ENDED
        self.write()

    def remaining(self, place: dict[str, Any], contenders: Collection[str]) -> tuple[str, ...]:
        """Who is to be timed in a cell so that all of these will have been, together with those who were already.

        Nobody, if there is nothing to do. Those who ended the process are left out.
        """
        cell = next((cell for cell in self.results["cells"] if _place(cell) == place), None)
        before = [] if cell is None else [*cell["timed"], *cell["missing"]]
        wanted = [name for name in contenders if name not in self.results["ended"]]
        if _IN_TURN in before or set(wanted) <= set(before):
            return ()
        return tuple(dict.fromkeys([*(name for name in before if name not in self.results["ended"]), *wanted]))

    def add(self, cell: Cell, rows: Iterable[dict[str, Any]]) -> None:
        """Write what was found, in the place of what was found there before."""
        place = {"n": cell.n, "k": cell.k, "m": cell.m, "dtype": cell.dtype}
        for name, new in (
            ("cells", [place | {"timed": list(cell.timings), "missing": cell.missing}]),
            ("rows", list(rows)),
        ):
            self.results[name] = [old for old in self.results[name] if _place(old) != place] + new
        self.write()

    def reach(self, ceilings: dict[str, float]) -> None:
        """Note what the device could do at most; the best of all times counts."""
        known = self.results["ceilings"]
        for name, value in ceilings.items():
            known[name] = max(value, known.get(name, 0.0))

    def write(self) -> None:
        missing = dict(self.results["missing"])
        for cell in self.results["cells"]:
            where = "{n}x{k}, m = {m}, {dtype}".format(**cell)
            for name, why in cell["missing"].items():
                missing.setdefault(name, f"{why} (at {where})")
        self.results["missing"] = missing | self.results["ended"]
        if self.path is not None:
            write_results(self.path, self.results)


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _PLACE}
