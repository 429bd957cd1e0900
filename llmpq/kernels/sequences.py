"""Sequences: which tokens of which sequences an operation is about, and DeviceSequences, the same as a device reads it.

CacheLayer: where their keys and values are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from llmpq.kernels.registry import load
from llmpq.spec.layers import KV_BLOCK, blocks_for

_ALIGNED = 4  # int32 numbers: 16 bytes, by which every part begins, since kernels are compiled for how pointers align


def _lens(count: int, tokens: int, columns: int) -> tuple[int, ...]:
    """How many numbers the parts of a packed tensor have."""
    return count, count + 1, count, tokens, tokens, count * columns


def _places(lens: tuple[int, ...]) -> list[int]:
    """Where each part of so many numbers begins in a packed tensor, and the tensor's size."""
    return [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in lens)]


@dataclass(frozen=True, eq=False)
class DeviceSequences:
    """Sequences as a device reads them: int32 tensors there, all views of one, so that one copy fills them.

    A sequence of which context_lens says 0 is absent, and so is a token whose position is -1. Nothing is stored for
    them, and what is computed for them is finite and without a meaning. A CUDA graph reads these tensors at each of its
    replays: `absent` makes them, `copy_` writes the sequences of the next replay.
    """

    packed: torch.Tensor
    slots: torch.Tensor  # [s]
    query_starts: torch.Tensor  # [s + 1]: the first new token of each sequence, and how many there are of all
    context_lens: torch.Tensor  # [s]
    token_sequences: torch.Tensor  # [t]: which sequence each token is of
    positions: torch.Tensor  # [t]: of each token in its sequence
    tables: torch.Tensor | None  # [s, columns]: the blocks of each sequence; None: those of their slots

    @classmethod
    def of(cls, packed: torch.Tensor, count: int, tokens: int, columns: int) -> DeviceSequences:
        """The views of a tensor that `Sequences.packed` has filled with `count` sequences of so many tokens."""
        lens = _lens(count, tokens, columns)
        *parts, tables = [packed[start : start + size] for start, size in zip(_places(lens), lens)]
        slots, query_starts, context_lens, token_sequences, positions = parts
        found = tables.view(count, columns) if columns else None
        return cls(packed, slots, query_starts, context_lens, token_sequences, positions, found)

    @classmethod
    def absent(cls, count: int, device: torch.device, columns: int = 0) -> DeviceSequences:
        """Room for `count` sequences of one new token and up to so many blocks each, all absent yet.

        Without columns it has no tables, and sequences have the blocks of their slots. With them, sequences without
        tables have those of slots that own as many blocks as there are columns.
        """
        none = torch.empty(0, dtype=torch.int32, device="cpu")
        return cls.of(Sequences(none, none, none).packed(count, columns).to(device), count, count, columns)

    @property
    def columns(self) -> int:
        """Of the tables."""
        return 0 if self.tables is None else self.tables.shape[1]

    def copy_(self, sequences: Sequences) -> None:
        """Become these sequences, and absent ones behind them; on the current stream, which is not waited for.

        Raises ValueError for more sequences, other numbers of tokens, or more blocks than there is room for.
        """
        count, tokens = len(self.slots), len(self.positions)
        if len(sequences.slots) > count or sequences.tokens + count - len(sequences.slots) != tokens:
            raise ValueError(
                f"{len(sequences.slots)} sequences of {sequences.tokens} new tokens do not fit where {count} of "
                f"{tokens} are expected"
            )
        if sequences.columns > self.columns:
            raise ValueError(f"tables have {sequences.columns} columns, but there is room for {self.columns}")
        packed = sequences.packed(count, self.columns, pinned=self.packed.is_cuda)
        self.packed.copy_(packed, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Sequences:
    """New tokens of several sequences, packed one after the other. All tensors are int32 [s], contiguous, on the CPU.

    Sequence s has its cache in slots[s], query_lens[s] new tokens and context_lens[s] tokens in all; its new token i is
    at position context_lens[s] - query_lens[s] + i. Row s of `tables` (int32 [s, columns], what is behind a sequence's
    blocks is any of them) has the blocks of its cache; without tables it has those of its slot. One serves all layers
    of a step. Raises ValueError.
    """

    slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    tables: torch.Tensor | None = None
    tokens: int = field(init=False)  # new ones of all sequences
    num_slots: int = field(init=False)  # that a cache must have at least
    num_blocks: int = field(init=False)  # likewise, of what `tables` name
    longest: int = field(init=False)  # of context_lens
    _on_devices: dict[torch.device, DeviceSequences] = field(init=False, repr=False, default_factory=dict)
    _rows: dict[int, torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        count = self.slots.shape[0] if self.slots.dim() else 0
        for name in ("slots", "query_lens", "context_lens"):
            lens = getattr(self, name)
            if lens.dtype != torch.int32 or lens.shape != (count,) or lens.device.type != "cpu":
                raise ValueError(
                    f"{name} is {lens.dtype} {list(lens.shape)} on {lens.device}, expected int32 [{count}] on the CPU"
                )
            object.__setattr__(self, name, lens.contiguous())
        slots, query_lens, context_lens = (t.tolist() for t in (self.slots, self.query_lens, self.context_lens))
        if slots and min(slots) < 0:
            raise ValueError(f"slots names {min(slots)}, expected 0 or more")
        for queries, context in zip(query_lens, context_lens):
            if not 0 < queries <= context:
                raise ValueError(
                    f"query_lens and context_lens say {queries} and {context}, expected 0 < query_len <= context_len"
                )
        self._check_tables(count, max(context_lens, default=0))
        object.__setattr__(self, "tokens", sum(query_lens))
        object.__setattr__(self, "num_slots", max(slots, default=-1) + 1)
        object.__setattr__(self, "longest", max(context_lens, default=0))

    def _check_tables(self, count: int, longest: int) -> None:
        num_blocks = 0
        if (tables := self.tables) is not None:
            if tables.dtype != torch.int32 or tables.dim() != 2 or len(tables) != count or tables.device.type != "cpu":
                raise ValueError(
                    f"tables is {tables.dtype} {list(tables.shape)} on {tables.device}, expected int32 [{count}, "
                    "blocks] on the CPU"
                )
            if tables.shape[1] < blocks_for(longest):
                needed = blocks_for(longest)
                raise ValueError(f"tables have {tables.shape[1]} blocks, but {longest} tokens need {needed}")
            if tables.numel():
                least, most = (int(number) for number in tables.aminmax())
                if least < 0:
                    raise ValueError(f"tables name block {least}, expected 0 or more")
                num_blocks = most + 1
            object.__setattr__(self, "tables", tables.contiguous())
        object.__setattr__(self, "num_blocks", num_blocks)

    @property
    def columns(self) -> int:
        """Of the tables; 0 without."""
        return 0 if self.tables is None else self.tables.shape[1]

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one new token."""
        return self.tokens == len(self.slots)

    @cached_property
    def shortest_query(self) -> int:
        """The fewest new tokens of a sequence; there must be one."""
        return int(self.query_lens.min())

    @cached_property
    def longest_query(self) -> int:
        """The most new tokens of a sequence; there must be one."""
        return int(self.query_lens.max())

    @cached_property
    def positions(self) -> torch.Tensor:
        """int32 [t]: position of each token in its sequence."""
        if self.is_decode:
            return self.context_lens - 1
        # A sequence's last token is at context_lens - 1; the others are as far from it as their rows.
        shifts = self.context_lens - self.query_lens.cumsum(0, dtype=torch.int32)
        return torch.arange(self.tokens, dtype=torch.int32, device="cpu") + shifts.repeat_interleave(self.query_lens)

    @cached_property
    def token_sequences(self) -> torch.Tensor:
        """int32 [t]: which sequence each token is of."""
        rows = torch.arange(len(self.slots), dtype=torch.int32, device="cpu")
        return rows if self.is_decode else rows.repeat_interleave(self.query_lens)

    def packed(self, count: int | None = None, columns: int | None = None, *, pinned: bool = False) -> torch.Tensor:
        """What a DeviceSequences views, int32 on the CPU; with absent sequences of one token if `count` is larger.

        Tables are filled up to so many columns, those of slots if there are none.
        """
        absent = 0 if count is None else count - len(self.slots)
        count, tokens = len(self.slots) + absent, self.tokens + absent
        columns = self.columns if columns is None else columns
        places = _places(_lens(count, tokens, columns))
        packed = torch.empty(places[-1], dtype=torch.int32, device="cpu", pin_memory=pinned)
        # By numpy: a decode step waits for this, and torch takes three times as long for a few numbers.
        numbers, here = packed.numpy(), len(self.slots)
        numbers.fill(0)
        slots, query_starts, context_lens, token_sequences, positions, tables, _ = places
        numbers[slots : slots + here] = self.slots.numpy()
        starts = numbers[query_starts + 1 : query_starts + 1 + count]
        self.query_lens.numpy().cumsum(out=starts[:here])
        starts[here:] = range(self.tokens + 1, tokens + 1)
        numbers[context_lens : context_lens + here] = self.context_lens.numpy()
        numbers[token_sequences : token_sequences + self.tokens] = self.token_sequences.numpy()
        numbers[positions : positions + self.tokens] = self.positions.numpy()
        numbers[positions + self.tokens : positions + tokens] = -1
        if columns:
            rows = numbers[tables : tables + count * columns].reshape(count, columns)[:here]
            if self.tables is None:
                rows[:] = self.slots.numpy()[:, None] * columns + range(columns)
            else:
                rows[:, : self.columns] = self.tables.numpy()
        return packed

    @cached_property
    def handle(self) -> Any:
        """What the extension module of the backend "cpu" needs to know, looked up once."""
        return load("cpu").sequences_handle(self)

    def on(self, device: torch.device) -> DeviceSequences:
        """The sequences on a device, copied there once."""
        if device not in self._on_devices:
            packed = self.packed(pinned=device.type == "cuda").to(device, non_blocking=True)
            self._on_devices[device] = DeviceSequences.of(packed, len(self.slots), self.tokens, self.columns)
        return self._on_devices[device]

    def placed(self, on_device: DeviceSequences) -> Sequences:
        """These sequences with what `on` returns for that device: what a captured CUDA graph is to read.

        Kernels of backend "triton" take from the host how many sequences and tokens there are, and else read that.
        Raises ValueError for other numbers of sequences or tokens.
        """
        if (len(on_device.slots), len(on_device.positions)) != (len(self.slots), self.tokens):
            raise ValueError(
                f"{len(on_device.slots)} sequences of {len(on_device.positions)} tokens are placed, expected "
                f"{len(self.slots)} of {self.tokens}"
            )
        placed = replace(self)
        placed._on_devices[on_device.packed.device] = on_device
        return placed

    def rows_of(self, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table [max_len, d] for the tokens' positions, [t, 1, d], looked up once."""
        key = table.data_ptr()
        if key not in self._rows:
            self._rows[key] = table[self.on(table.device).positions].unsqueeze_(1)
        return self._rows[key]


@dataclass(frozen=True, eq=False)
class CacheLayer:
    """Keys and values of one layer, [kv_heads, blocks, ...]: a pool of blocks of KV_BLOCK positions.

    A sequence has up to `max_len` of them: position p is in block p // KV_BLOCK of its table, or without a table of its
    slot, which has `slot_blocks` of its own. If these are fewer, the layer is a ring: it keeps the latest positions of
    a slot in the slot's own blocks, which are used in turn, whatever tables say. How a block lies in the tensors is the
    backend's affair, and what it holds where no sequence has written is anything.

    Keys and values of int8 are codes: of position p of block b in kv head h they are times scales[h, b, p].
    """

    backend: str
    keys: torch.Tensor
    values: torch.Tensor
    max_len: int
    head_dim: int
    slot_blocks: int
    key_scales: torch.Tensor | None = None  # float32 [kv_heads, blocks, KV_BLOCK]; None: keys and values are floating
    value_scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """That have blocks of their own."""
        return self.blocks // self.slot_blocks

    @property
    def capacity(self) -> int:
        """Positions of a slot's own blocks."""
        return self.slot_blocks * KV_BLOCK

    @property
    def is_ring(self) -> bool:
        return self.capacity < self.max_len

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @cached_property
    def handle(self) -> Any:
        """What the backend's extension module needs to know, looked up once."""
        return load(self.backend).cache_handle(self)
