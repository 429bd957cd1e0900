"""Which blocks of the KV cache belong to which sequence: a pure value, as all of the schedule is.

A block of a prompt has a name, which says what its tokens and all before them are. Sequences that begin alike share
such blocks: whoever comes first computes them. They keep their names when nobody has them any more, until others need
the room.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmpq.spec.layers import KV_BLOCK

_AT_ONCE = 128  # one in so many idle blocks loses its name too, when some have to


def block_names(tokens: Sequence[int]) -> tuple[int, ...]:
    """A name for each full block of a prompt: a hash of its tokens and the name before it."""
    names: list[int] = []
    digest = b""
    for end in range(KV_BLOCK, len(tokens) + 1, KV_BLOCK):
        block = array("q", tokens[end - KV_BLOCK : end]).tobytes()
        digest = hashlib.blake2b(digest + block, digest_size=16).digest()
        names.append(int.from_bytes(digest, "big"))
    return tuple(names)


@dataclass(frozen=True, slots=True)
class BlockPool:
    """Blocks that are free, those of each owner in the order of its tokens, and idle ones, whose names are still known.

    An owner's blocks follow each other where they can: memory is read sooner in one piece. What grows with the cache is
    kept in dicts, which are copied in one piece, and never changed.
    """

    free: tuple[int, ...]  # rising
    tables: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    shared: Mapping[int, int] = field(default_factory=dict)  # how many of an owner's blocks, the first, others computed
    named: dict[int, int] = field(default_factory=dict)  # the block of each name
    names: dict[int, int] = field(default_factory=dict)  # the name of each block that has one
    users: dict[int, int] = field(default_factory=dict)  # how many owners each of these has, if any
    idle: tuple[int, ...] = ()  # those of these that have none; who has been so longest comes first

    @classmethod
    def of(cls, count: int) -> BlockPool:
        return cls(tuple(range(count)))

    @property
    def available(self) -> int:
        """Blocks that nobody has."""
        return len(self.free) + len(self.idle)

    def known(self, names: Sequence[int]) -> tuple[int, ...]:
        """The blocks of these names, up to the first that is not known."""
        found: list[int] = []
        for name in names:
            if name not in self.named:
                break
            found.append(self.named[name])
        return tuple(found)

    def beginning(self, owner: int, blocks: tuple[int, ...]) -> BlockPool:
        """A new owner begins with these blocks, which have names; others may have them, too."""
        if not blocks:
            return self
        woken = {block for block in blocks if block not in self.users}
        return replace(
            self,
            tables={**self.tables, owner: blocks},
            shared={**self.shared, owner: len(blocks)},
            users=self.users | {block: self.users.get(block, 0) + 1 for block in blocks},
            idle=tuple(block for block in self.idle if block not in woken) if woken else self.idle,
        )

    def with_more(self, owner: int, count: int, start: int = 0) -> BlockPool:
        """The owner has `count` blocks more: the first free ones behind its last, or if it has none from `start` on.

        Behind the last of all come the first. Idle ones lose their names if need be. Raises ValueError if fewer are
        there.
        """
        if count > self.available:
            raise ValueError(f"{owner} needs {count} more blocks, but {self.available} are free")
        pool = self._with_free(count)
        table = pool.tables.get(owner, ())
        at = bisect_left(pool.free, table[-1] if table else start)
        taken = pool.free[at : at + count]
        around = count - len(taken)  # from the first on
        free = pool.free[around:at] + pool.free[at + count :]
        return replace(pool, free=free, tables={**pool.tables, owner: table + taken + pool.free[:around]})

    def naming(self, owner: int, names: Sequence[int]) -> BlockPool:
        """The owner's first blocks have these names, but for those that other blocks have."""
        new = {name: block for name, block in zip(names, self.tables[owner]) if name not in self.named}
        if not new:
            return self
        return replace(
            self,
            named=self.named | new,
            names=self.names | {block: name for name, block in new.items()},
            users=self.users | dict.fromkeys(new.values(), 1),
        )

    def is_awaited(self, owner: int) -> bool:
        """Whether others have blocks that are the owner's to compute."""
        return any(self.users.get(block, 0) > 1 for block in self.tables[owner][self.shared.get(owner, 0) :])

    def without(self, owners: Sequence[int], unfinished: Container[int] = ()) -> BlockPool:
        """What these alone have is free, or idle if it has names.

        Names are lost of what is not computed: of those that are unfinished, all but what others had computed.
        """
        users, idle, free = self.users.copy(), list(self.idle), list(self.free)
        forgotten: list[int] = []
        for owner in owners:
            table = self.tables.get(owner, ())
            computed = self.shared.get(owner, 0) if owner in unfinished else len(table)
            for i, block in reversed([*enumerate(table)]):  # the last is the first to lose its name
                left = users.pop(block, 1) - 1
                if left:
                    users[block] = left
                elif block in self.names and i < computed:
                    idle.append(block)
                else:
                    free.append(block)
                    forgotten.append(block)
        pool = self._unnamed(forgotten)
        return replace(
            pool,
            free=tuple(sorted(free)),
            tables={owner: table for owner, table in self.tables.items() if owner not in owners},
            shared={owner: count for owner, count in self.shared.items() if owner not in owners},
            users=users,
            idle=tuple(idle),
        )

    def _with_free(self, count: int) -> BlockPool:
        """With at least `count` free blocks; idle ones give up their names for it.

        Forgetting copies all names, so a few more are taken at once.
        """
        missing = count - len(self.free)
        if missing <= 0:
            return self
        taken = max(missing, len(self.idle) // _AT_ONCE)
        lost = self.idle[:taken]
        return replace(self._unnamed(lost), free=tuple(sorted(self.free + lost)), idle=self.idle[taken:])

    def _unnamed(self, blocks: Sequence[int]) -> BlockPool:
        """Those of these blocks that have names lose them."""
        lost = [block for block in blocks if block in self.names]
        if not lost:
            return self
        named, names = self.named.copy(), self.names.copy()
        for block in lost:
            del named[names.pop(block)]
        return replace(self, named=named, names=names)
