"""ModelSpec: the numbers of one decoder-only transformer that planner, kernels and decoder all need."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from llmpq.spec.errors import UsageError
from llmpq.spec.precision import W16, Mixed, Native, Precision, UnitPrecision
from llmpq.spec.ranges import Count, Index, Layers, Positive, Range, Size
from llmpq.spec.record import Record, check

Dtype = Literal["float32", "float16", "bfloat16"]
# gelu_tanh: with the approximation by a tanh. swiglu_clamped: of gate and up, (up + 1) * gate * sigmoid(1.702 * gate),
# the gate at most 7 and up from -7 to 7.
Activation = Literal["silu", "relu", "gelu", "gelu_tanh", "swiglu_clamped"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def kv_dtype(compute_dtype: Dtype) -> Dtype:
    """What keys and values are kept in by a stage that computes in `compute_dtype`: always 16 bits."""
    return "float16" if compute_dtype == "float32" else compute_dtype


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear, y[m, n] = x[m, k] @ weight[n, k].T (+ bias[n])."""

    n: int
    k: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RopeScaling(Record):
    """Llama 3's frequency scaling (transformers: rope_type "llama3") or plain position interpolation ("linear")."""

    kind: Literal["llama3", "linear"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_positions: Size = 8192

    def validate(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        check(low < high, "high_freq_factor", f"is {high}, with a low_freq_factor of {low}")


@dataclass(frozen=True, slots=True)
class LayerKind(Record):
    """What makes decoder layers differ in cost and in memory."""

    window: Count | None = None  # keys that a query attends to, its own and the latest before it; None: all

    def cached_tokens(self, length: int, step: int) -> int:
        """Tokens of one sequence that the KV cache holds, for sequences of `length` and steps of `step` tokens each."""
        return length if self.window is None else min(length, self.window + step)


@dataclass(frozen=True, slots=True)
class ModelSpec(Record):
    """Architecture of a model. Units are what is placed and given a precision: embedding, each layer, head."""

    name: str
    content_hash: str  # identifies configuration and weights; a plan and a sensitivity are valid for one content only
    num_layers: Layers
    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    intermediate_size: Size
    vocab_size: Size
    max_positions: Size
    dtype: Dtype  # the model's own floating type; "16 bit" is this one
    tied_embeddings: bool
    embedding_dim: Size  # differs from hidden_size only in OPT-350m, which projects in and out
    norm_eps: Annotated[float, Range(0.0, 1.0)]
    norm: Literal["rms", "layer"]  # a LayerNorm has a bias
    activation: Activation
    gated_mlp: bool  # down(activation(gate(x)) * up(x)); else down(activation(up(x)))
    attention_bias: bool
    mlp_bias: bool
    norm_first: bool  # False: post-norm (OPT-350m)
    final_norm: bool
    rope_theta: Positive | None  # None: learned positions
    rope_scaling: RopeScaling | None
    position_offset: Index  # rows of the table of learned positions before that of position 0
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)  # of layers 0, 1, ...; repeated until every layer has one
    source_hash: str = ""  # content_hash of the model that this one was quantized from; "": none
    # Unit -> linear -> how the checkpoint stores it; only units all of whose linears are stored in one such precision.
    stored: dict[str, dict[str, Precision]] = field(default_factory=dict)

    def validate(self) -> None:
        if self.rope_theta is not None:
            rotates = self.head_dim % 2 == 0
            check(rotates, "head_dim", f"is {self.head_dim}, expected an even number, as pairs rotate")
        for unit, precisions in self.stored.items():
            expected = list(self.linears(unit)) if unit in self.units else "no such unit"
            check(list(precisions) == expected, f"stored[{unit!r}]", f"has {list(precisions)}, expected {expected}")
        check(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}",
        )
        kinds = len(self.layer_kinds)
        check(1 <= kinds <= self.num_layers, "layer_kinds", f"has {kinds} entries for {self.num_layers} layers")

    def part(self, members: int) -> ModelSpec:
        """What each of `members` equal devices holds and computes of this model, as a model that is as much narrower.

        Megatron-LM's split (arXiv 1909.08053, section 3): qkv and up by their outputs, out and down by their inputs,
        attention by heads, the table by its rows; norms and hidden states are whole everywhere. Raises UsageError if
        `members` does not divide all of these.
        """
        if members == 1:
            return self
        split = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
        sizes = {name: getattr(self, name) for name in split}
        for name, size in sizes.items():
            if size % members:
                raise UsageError(f"{self.name} cannot be split into {members} parts, as its {name} is {size}")
        return replace(self, **{name: size // members for name, size in sizes.items()})

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units in order: "embedding", "layer.0", ..., "head"."""
        return ("embedding", *(f"layer.{i}" for i in range(self.num_layers)), "head")

    def layer_kind(self, layer: int) -> LayerKind:
        return self.layer_kinds[layer % len(self.layer_kinds)]

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """[layers] The group of each layer, numbered by first appearance.

        Layers of one group take the same time and memory as each other on any device, at any precision.
        """
        numbers: dict[tuple[object, ...], int] = {}
        alike = [(self.layer_kind(i), *self.stored.get(f"layer.{i}", {}).values()) for i in range(self.num_layers)]
        return tuple(numbers.setdefault(layer, len(numbers)) for layer in alike)

    @property
    def distinct_units(self) -> tuple[str, ...]:
        """Units that differ in cost: the embedding, the first layer of each group, the head."""
        groups = self.layer_groups
        return ("embedding", *(f"layer.{groups.index(group)}" for group in range(max(groups) + 1)), "head")

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layer_linears(self) -> dict[str, LinearShape]:
        """The fused linears of one decoder layer by name, in the order they run."""
        q_dim = self.num_heads * self.head_dim
        up = 2 * self.intermediate_size if self.gated_mlp else self.intermediate_size
        return {
            "qkv": LinearShape(q_dim + 2 * self.kv_dim, self.hidden_size, self.attention_bias),
            "out": LinearShape(self.hidden_size, q_dim, self.attention_bias),
            "up": LinearShape(up, self.hidden_size, self.mlp_bias),
            "down": LinearShape(self.hidden_size, self.intermediate_size, self.mlp_bias),
        }

    @property
    def widest_activations(self) -> int:
        """Numbers for each token that a half of a layer holds beside hidden states: attention's, or the MLP's."""
        q_dim = self.num_heads * self.head_dim
        attention = q_dim + 2 * self.kv_dim + q_dim  # q, k and v; the result
        return max(attention, self.layer_linears["up"].n)

    @property
    def table(self) -> LinearShape:
        """The embedding table, and the LM head: [vocab_size, embedding_dim]."""
        return LinearShape(self.vocab_size, self.embedding_dim)

    def linears(self, unit: str) -> dict[str, LinearShape]:
        """The matrices of a unit that take its precision, by name."""
        return {"table": self.table} if unit in ("embedding", "head") else self.layer_linears

    def projection(self, unit: str) -> LinearShape | None:
        """The 16-bit linear between embedding size and hidden size in "embedding" and "head"; None: they are equal."""
        if self.embedding_dim == self.hidden_size or unit not in ("embedding", "head"):
            return None
        into = LinearShape(self.hidden_size, self.embedding_dim)
        return into if unit == "embedding" else LinearShape(into.k, into.n)

    def linear_precisions(self, unit: str, option: UnitPrecision) -> dict[str, Precision]:
        """The precision of each of a unit's linears, by name. Raises UsageError if the unit cannot have the option."""
        if isinstance(option, Native):
            if unit not in self.stored:
                raise UsageError(
                    f"{self.name} stores {unit} in no precision that kernels read, so it cannot be native; choose its "
                    "bits"
                )
            return self.stored[unit]
        linears = self.linears(unit)
        found = dict(option.linears) if isinstance(option, Mixed) else dict.fromkeys(linears, option)
        if list(found) != list(linears):
            raise UsageError(f"{unit} has {', '.join(linears)}, but precisions are given for {', '.join(found)}")
        if any(precision.quantizer == "gguf" for precision in found.values()):
            raise UsageError(f"{unit} cannot be quantized to {option}, which is made by others; choose native")
        return found

    @property
    def stored_layouts(self) -> tuple[Precision, ...]:
        """The precisions of all linears that are stored in one, as kernels see them."""
        return tuple(dict.fromkeys(p.layout for precisions in self.stored.values() for p in precisions.values()))

    def bits(self, unit: str, option: UnitPrecision) -> float:
        """Bits of a code, on average over a unit's weights."""
        linears, precisions = self.linears(unit), self.linear_precisions(unit, option)
        sizes = {name: linear.n * linear.k for name, linear in linears.items()}
        return sum(sizes[name] * precisions[name].bits for name in sizes) / sum(sizes.values())

    def unit_bytes(self, unit: str, option: UnitPrecision, positions: int | None = None) -> int:
        """Bytes of one unit's weights: its matrices as packed, its norms and biases as float32.

        Of learned positions as many as `positions`, where a stage keeps no more; None: all.
        """
        linears = self.linears(unit)
        norm = self.hidden_size * (2 if self.norm == "layer" else 1)
        if unit == "embedding":
            stored = self.max_positions + self.position_offset if positions is None else positions
            small = 0 if self.rope_theta is not None else stored * self.hidden_size
        elif unit == "head":
            small = norm if self.final_norm else 0
        else:
            small = 2 * norm + sum(linear.n for linear in linears.values() if linear.bias)
        total = 4 * small
        for name, precision in self.linear_precisions(unit, option).items():
            total += precision.weight_bytes(linears[name].n, linears[name].k)
        projection = self.projection(unit)
        return total if projection is None else total + W16.weight_bytes(projection.n, projection.k)

    def compute_dtype(self, device_kind: str) -> Dtype:
        """What a device computes in: float32 on a CPU, a 16-bit type on a GPU."""
        if device_kind == "cpu":
            return "float32"
        return "float16" if self.dtype == "float32" else self.dtype

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of one layer's keys and values, which are of `dtype`, for `tokens` cached tokens."""
        return 2 * tokens * self.kv_dim * DTYPE_BYTES[dtype]
