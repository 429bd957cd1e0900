"""Which blocks of the KV cache belong to which sequence: a pure value, as all of the schedule is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BlockPool:
    """Blocks that are free, and those of each owner in the order of its tokens. Every block is one or the other.

    An owner's blocks follow each other where they can: memory is read sooner in one piece.
    """

    free: tuple[int, ...]  # rising
    tables: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, count: int) -> BlockPool:
        return cls(tuple(range(count)))

    def with_more(self, owner: int, count: int, start: int = 0) -> BlockPool:
        """The owner has `count` blocks more: the first free ones behind its last, or if it is new from `start` on.

        Behind the last of all come the first. Raises ValueError if fewer are free.
        """
        if count > len(self.free):
            raise ValueError(f"{owner} needs {count} more blocks, but {len(self.free)} are free")
        table = self.tables.get(owner, ())
        at = bisect_left(self.free, table[-1] if table else start)
        taken = self.free[at : at + count]
        around = count - len(taken)  # from the first on
        free = self.free[around:at] + self.free[at + count :]
        return BlockPool(free, {**self.tables, owner: table + taken + self.free[:around]})

    def without(self, owners: Sequence[int]) -> BlockPool:
        """What these have is free."""
        given_back = (block for owner in owners for block in self.tables.get(owner, ()))
        free = tuple(sorted((*self.free, *given_back)))
        return BlockPool(free, {owner: table for owner, table in self.tables.items() if owner not in owners})
