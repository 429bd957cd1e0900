"""What a decoder's layers are made of, and in what they differ from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from llmpq.spec.precision import Precision
from llmpq.spec.ranges import Count, Index, Positive, Size
from llmpq.spec.record import Record, check

T = TypeVar("T")

# swiglu_clamped is that of gpt_oss; gelu_tanh is gelu with the approximation by a tanh.
Activation = Literal["silu", "relu", "gelu", "gelu_tanh", "swiglu_clamped"]

# How attention and MLP, each as f, and their norms follow each other:
#     pre                h + f(norm(h))
#     post               norm(h + f(h))                                OPT-350m
#     out                h + norm(f(h))                                OLMo 2
#     sandwich           h + norm(f(norm(h)))                          Gemma 2 and 3
#     parallel           h + attention(norm(h)) + MLP(other norm(h))   GPT-NeoX
#     parallel_one_norm  h + attention(x) + MLP(x), x = norm(h)        Phi
Block = Literal["pre", "post", "out", "sandwich", "parallel", "parallel_one_norm"]
KV_BLOCK = 64  # positions of a block of the KV cache: kBlockKeys of csrc/cpu/kernels.h
BLOCK_NORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pre", "post", "parallel"), ("attention_norm", "mlp_norm")),
    "out": ("attention_out_norm", "mlp_out_norm"),
    "sandwich": ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"),
    "parallel_one_norm": ("attention_norm",),
}


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear, y[m, n] = x[m, k] @ weight[n, k].T (+ bias[n]); or as many of one shape as there are experts."""

    n: int
    k: int
    bias: bool = False
    experts: int = 1

    @property
    def stacked(self) -> LinearShape:
        """The rows of all experts after each other, as one matrix: how checkpoint and cache have them."""
        return LinearShape(self.experts * self.n, self.k, self.bias)

    @property
    def weights(self) -> int:
        """How many numbers its matrices have."""
        return self.experts * self.n * self.k

    def weight_bytes(self, precision: Precision) -> int:
        """Bytes of its matrices as packed."""
        return self.experts * precision.weight_bytes(self.n, self.k)


@dataclass(frozen=True, slots=True)
class Rope(Record):
    """Rotary position embedding (arXiv 2104.09864) of the first `dims` dimensions of a head.

    Dimension j is rotated with j + dims / 2 by position * theta ** (-2j / dims) / factors[j]. What there is of scalings
    comes to such factors, but for those that depend on the longest sequence that a slot has room for.
    """

    theta: Positive
    dims: Size
    factors: tuple[Positive, ...] = ()  # [dims / 2]; (): all are 1
    long_factors: tuple[Positive, ...] = ()  # in their place for slots of more than original_positions; (): the same
    original_positions: Size | None = None
    dynamic: Positive | None = None  # NTK scaling of theta by this factor for slots of more than original_positions
    magnitude: Positive = 1.0  # times cosines and sines; yarn's and longrope's attention factor
    long_magnitude: Positive = 1.0  # where long_factors are used

    def validate(self) -> None:
        check(self.dims % 2 == 0, "dims", f"is {self.dims}, expected an even number, as pairs rotate")
        for name in ("factors", "long_factors"):
            count = len(getattr(self, name))
            check(count in (0, self.dims // 2), name, f"has {count} numbers for {self.dims // 2} pairs")
        by_length = bool(self.long_factors) or self.dynamic is not None
        check(not by_length or self.original_positions is not None, "original_positions", "is missing")


@dataclass(frozen=True, slots=True)
class Experts(Record):
    """A mixture of experts in place of an MLP: each token goes through those that a router likes best."""

    count: Count
    per_token: Count
    intermediate_size: Size  # of each
    normalized: bool  # the weights of a token's experts add up to 1; else they are those of a softmax over all
    shared_size: Index = 0  # intermediate size of one more that all tokens go through, times a sigmoid; 0: none
    router_bias: bool = False

    def validate(self) -> None:
        check(self.count > 1, "count", "is 1, but a mixture has several experts")
        enough = self.per_token <= self.count
        check(enough, "per_token", f"is {self.per_token}, but there are {self.count} experts")


@dataclass(frozen=True, slots=True)
class LayerKind(Record):
    """In what decoder layers of one model differ."""

    window: Count | None = None  # keys that a query attends to, its own and the latest before it; None: all
    rope: Rope | None = None  # None: nothing is rotated
    experts: Experts | None = None  # None: the MLP is one

    def cached_tokens(self, length: int, step: int) -> int:
        """Tokens of one sequence that the KV cache holds, for sequences of `length` and steps of `step` tokens each.

        In whole blocks: all, or within a window what the first token of a step sees, and the step.
        """
        kept = length if self.window is None else min(length, self.window + step - 1)
        return blocks_for(kept) * KV_BLOCK

    @property
    def cost(self) -> tuple[object, ...]:
        """What of it makes a difference in time and memory."""
        return self.window, self.experts


def blocks_for(tokens: int) -> int:
    """How many blocks of the KV cache hold so many tokens of one sequence."""
    return -(-tokens // KV_BLOCK)


def shortest_period(values: Sequence[T]) -> tuple[T, ...]:
    """The shortest beginning whose repetition begins with all of `values`."""
    lengths = (n for n in range(1, len(values) + 1) if all(values[i] == values[i % n] for i in range(len(values))))
    return tuple(values[: next(lengths, 0)])
