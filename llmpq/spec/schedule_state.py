"""What the schedule knows and says: the limits of a plan, requests, events, actions, and the state between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmpq.spec.block_pool import BlockPool
from llmpq.spec.layers import KV_BLOCK
from llmpq.spec.model import ModelSpec
from llmpq.spec.plan import Plan
from llmpq.spec.trace import Phase


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan allows, in sequences and tokens."""

    stages: int
    slots: int
    prefill_microbatch: int
    decode_microbatch: int
    step_tokens: int  # of a prefill micro-batch
    chunk_tokens: int  # of one sequence in it
    blocks: int  # of the KV cache, which hold any one sequence
    block_tokens: int = KV_BLOCK
    shares_blocks: bool = False  # prompts that begin alike share blocks; where no layer keeps only the latest tokens
    beside_tokens: int = 0  # of prompts in a step in which others decode, see schedule.py; 0: nobody does so

    @classmethod
    def of(cls, plan: Plan, model: ModelSpec) -> Limits:
        return cls(
            len(plan.stages),
            plan.slots,
            plan.prefill_microbatch,
            plan.decode_microbatch,
            plan.step_tokens,
            plan.longest_query(model),
            plan.cache_blocks,
            shares_blocks=plan.keeps_all(model),
            beside_tokens=plan.chunk_tokens,
        )

    @property
    def prefills_beside_decode(self) -> int:
        """Prefill micro-batches at once while others decode: one for each stage, and for each link between stages."""
        return 2 * self.stages - 1

    @property
    def prefills_at_once(self) -> int:
        """Prefill micro-batches on their way: nearly twice as many, or prompts of unlike lengths would idle stages."""
        return 4 * self.stages - 3

    @property
    def step_sequences(self) -> int:
        """Sequences of the largest step."""
        return max(self.prefill_microbatch, self.decode_microbatch)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens of one sequence."""
        return parts(tokens, self.block_tokens)

    def decode_microbatches(self, sequences: int) -> int:
        """How many micro-batches so many sequences decode in."""
        planned = parts(self.slots, self.decode_microbatch)
        return max(parts(sequences, self.decode_microbatch), min(self.stages, planned, sequences))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the schedule sees it, known by its number."""

    request: int
    tokens: int  # of the prompt; of a request that waits again, those of its answer so far, too
    start: int = 0  # of these, whose chunks have been started
    names: tuple[int, ...] = ()  # of its full blocks: see block_pool.py


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of a prompt that does not fit in a step; `last`: none follow."""

    start: int
    end: int
    last: bool


@dataclass(frozen=True, slots=True)
class Admit:
    """Action: requests take slots of the KV cache, as pairs (request, slot); again, if they had to give one back."""

    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Requests that go through the pipeline in one step. As an action: start it.

    One of prefill has prompts, and behind them `beside` requests that decode in the same step.
    """

    phase: Phase
    requests: tuple[int, ...]
    chunk: Chunk | None = None  # of its only prompt; None: of each prompt all there is
    reused: tuple[int, ...] = ()  # but so many tokens of each prompt, which others compute before or have; (): none
    beside: int = 0

    @property
    def prompts(self) -> tuple[int, ...]:
        """The requests in prefill."""
        return self.requests[: len(self.requests) - self.beside] if self.phase == "prefill" else ()

    @property
    def decoding(self) -> tuple[int, ...]:
        """The requests that decode."""
        return self.requests[len(self.prompts) :]

    @property
    def begun(self) -> tuple[tuple[int, int], ...]:
        """The prompts whose first tokens it computes, each with how many are reused."""
        if self.chunk is not None and self.chunk.start and not self.reused:
            return ()
        return tuple(zip(self.prompts, self.reused or (0,) * len(self.prompts), strict=True))

    @property
    def is_prefix(self) -> bool:
        """Whether no token comes of its prompt, its first request."""
        return self.chunk is not None and not self.chunk.last

    @property
    def answered(self) -> tuple[int, ...]:
        """The requests that a token comes of."""
        return self.requests[self.is_prefix :]


@dataclass(frozen=True, slots=True)
class End:
    """Action: these requests have ended, by themselves or cancelled. They are in no micro-batch, and have no slot."""

    requests: tuple[int, ...]


Action = Admit | Microbatch | End


@dataclass(frozen=True, slots=True)
class Arrived:
    """Event: requests are handed in."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Event: requests are to end: at once, or if they are in a micro-batch on its way, when that returns.

    Requests that have ended, or never came, may be among them.
    """

    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """Event: the tokens of a micro-batch are back at the first stage; with them, the requests in `ended` have ended."""

    microbatch: Microbatch
    ended: frozenset[int]


Event = Arrived | Cancelled | Returned


@dataclass(frozen=True, slots=True)
class State:
    """Where all requests are that have not ended."""

    limits: Limits
    free: tuple[int, ...]  # slots
    pool: BlockPool  # what each admitted request has of the KV cache
    waiting: tuple[Prompt, ...] = ()  # for a slot, in the order they arrived
    slots: Mapping[int, int] = field(default_factory=dict)  # of each admitted request, in the order of admission
    lengths: Mapping[int, int] = field(default_factory=dict)  # tokens of each, those of its answer included
    names: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # of its full blocks, where it has any
    in_prefill: Mapping[int, int] = field(default_factory=dict)  # those without a token: their micro-batches
    ready: tuple[int, ...] = ()  # requests with a token that are in no micro-batch; who has waited longest comes first
    planned: tuple[Microbatch, ...] = ()  # that have not started, in their order
    new: Mapping[int, int] = field(default_factory=dict)  # requests that have not decoded yet: the admission of each
    cancelled: frozenset[int] = frozenset()  # requests on their way in a micro-batch that end when it returns
    leaving: int | None = None  # the request on its way that gives its blocks back when it returns
    prefills: int = 0  # micro-batches that are planned or on their way, and have prompts
    decodes: int = 0  # those in which requests decode
    started: int = 0  # micro-batches on their way
    admissions: int = 0  # so far

    @property
    def done(self) -> bool:
        return not (self.waiting or self.slots)

    @property
    def decoding(self) -> bool:
        """Whether some that are admitted have a token, so that they decode."""
        return len(self.slots) > len(self.in_prefill)

    @property
    def kv_tokens(self) -> int:
        """Tokens for which the blocks in use have room."""
        return (self.limits.blocks - self.pool.available) * self.limits.block_tokens

    @property
    def growing(self) -> int:
        """Blocks that the admitted requests need before all of them can have one token more."""
        limits, lengths = self.limits, self.lengths
        return sum(len(table) < limits.blocks_for(lengths[owner] + 1) for owner, table in self.pool.tables.items())

    @property
    def all_can_grow(self) -> bool:
        """Whether they can have it, and none has to give its blocks back for that."""
        return self.leaving is None and self.growing <= self.pool.available


def parts(count: int, size: int) -> int:
    """How many parts of a size hold all."""
    return -(-count // size)
