"""ModelSpec: the numbers of one decoder-only transformer that planner, kernels and decoder all need."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from llmpq.spec.errors import UsageError
from llmpq.spec.layers import BLOCK_NORMS, Activation, Block, LayerKind, LinearShape
from llmpq.spec.precision import GIVEN, NATIVE, W16, Mixed, Native, Precision, UnitPrecision
from llmpq.spec.ranges import Index, Layers, Positive, Range, Size
from llmpq.spec.record import Record, check

Dtype = Literal["float32", "float16", "bfloat16"]
DENSE = "qkv", "out", "up", "down"  # the fused linears of every decoder layer
SHARED = "shared_up", "shared_down"  # those of an expert that all tokens go through
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
KvBits = Literal[16, 8]  # of a number in the KV cache
KvDtype = Literal[Dtype, "int8"]
KV_SCALE_BYTES = 4  # of float32: int8 keys have one for each token and kv head, and so do values


def kv_dtype(compute_dtype: Dtype, bits: KvBits = 16) -> KvDtype:
    """What keys and values are kept in by a stage that computes in `compute_dtype`.

    In 8 bits, as codes of int8: round(x / scale) to even, where the scale is the largest |x| of a token and kv head
    over 127.
    """
    if bits == 8:
        return "int8"
    return "float16" if compute_dtype == "float32" else compute_dtype


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
    final_norm: bool
    position_offset: Index | None  # rows of the table of learned positions before that of position 0; None: no table
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)  # of layers 0, 1, ...; repeated until every layer has one
    block: Block = "pre"
    biases: tuple[str, ...] = ()  # the fused linears, and "head", that have one
    qk_norm: Literal["head", "row"] | None = None  # RMSNorm of queries and keys: of each head, or all heads of a token
    attention_scale: Positive | None = None  # of scores; None: head_dim ** -0.5
    attention_cap: Positive | None = None  # scores s become cap * tanh(s / cap)
    attention_sinks: bool = False  # one more score for each head, without a value
    alibi: bool = False  # scores fall with distance (arXiv 2108.12409)
    embedding_norm: bool = False
    embedding_scale: Positive = 1.0
    logit_scale: Positive = 1.0
    logit_cap: Positive | None = None  # logits x become cap * tanh(x / cap)
    source_hash: str = ""  # content_hash of the model that this one was quantized from; "": none
    # Unit -> linear -> how the checkpoint stores it, of linears that it stores in one precision that kernels read.
    stored: dict[str, dict[str, Precision]] = field(default_factory=dict)

    def validate(self) -> None:
        for unit, precisions in self.stored.items():
            linears = list(self.linears(unit)) if unit in self.units else []
            known = bool(precisions) and list(precisions) == [name for name in linears if name in precisions]
            check(known, f"stored[{unit!r}]", f"has {list(precisions)}, expected some of {linears}, in order")
        check(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}",
        )
        for i, name in enumerate(self.biases):
            check(name in (*DENSE, *SHARED, "head"), f"biases[{i}]", f"is {name!r}, which is no linear")
        kinds = len(self.layer_kinds)
        check(1 <= kinds <= self.num_layers, "layer_kinds", f"has {kinds} entries for {self.num_layers} layers")
        for i, kind in enumerate(self.layer_kinds):
            fits = kind.rope is None or kind.rope.dims <= self.head_dim
            check(fits, f"layer_kinds[{i}].rope.dims", f"is more than the {self.head_dim} dimensions of a head")
            added = kind.experts is None or self.block not in ("out", "sandwich")
            check(added, f"layer_kinds[{i}].experts", f"is not supported in blocks of form {self.block!r}")
        gated = self.gated_mlp or self.activation != "swiglu_clamped"
        check(gated, "activation", f"is {self.activation!r}, which needs gated_mlp")

    def part(self, members: int) -> ModelSpec:
        """What each of `members` equal devices holds and computes of this model, as a model that is as much narrower.

        Megatron-LM's split (arXiv 1909.08053, section 3): qkv and up by their outputs, out and down by their inputs,
        attention by heads, the table by its rows; norms and hidden states are whole everywhere. Raises UsageError if
        `members` does not divide all of these.
        """
        if members == 1:
            return self
        if any(kind.experts is not None for kind in self.layer_kinds):
            raise UsageError(f"{self.name} cannot be split into {members} parts, as it has layers of experts")
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
        alike = [(self.layer_kind(i).cost, *self.stored.get(f"layer.{i}", {}).items()) for i in range(self.num_layers)]
        return tuple(numbers.setdefault(layer, len(numbers)) for layer in alike)

    @property
    def distinct_units(self) -> tuple[str, ...]:
        """Units that differ in cost: the embedding, the first layer of each group, the head."""
        groups = self.layer_groups
        return ("embedding", *(f"layer.{groups.index(group)}" for group in range(max(groups) + 1)), "head")

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    def linears_of(self, kind: LayerKind) -> dict[str, LinearShape]:
        """The fused linears of a decoder layer by name, in the order they run."""

        def linear(name: str, n: int, k: int, experts: int = 1) -> LinearShape:
            return LinearShape(n, k, name in self.biases, experts)

        q_dim, hidden, gates = self.num_heads * self.head_dim, self.hidden_size, 2 if self.gated_mlp else 1
        found = {
            "qkv": linear("qkv", q_dim + 2 * self.kv_dim, hidden),
            "out": linear("out", hidden, q_dim),
        }
        experts = kind.experts
        size, count = (self.intermediate_size, 1) if experts is None else (experts.intermediate_size, experts.count)
        found["up"] = linear("up", gates * size, hidden, count)
        found["down"] = linear("down", hidden, size, count)
        if experts is not None and experts.shared_size:
            found["shared_up"] = linear("shared_up", gates * experts.shared_size, hidden)
            found["shared_down"] = linear("shared_down", hidden, experts.shared_size)
        return found

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a decoder layer, of hidden_size numbers each."""
        return BLOCK_NORMS[self.block]

    @property
    def attention_width(self) -> int:
        """Numbers for each token that attention makes: queries, keys and values; the result."""
        q_dim = self.num_heads * self.head_dim
        return q_dim + 2 * self.kv_dim + q_dim

    @property
    def widest_activations(self) -> int:
        """Numbers for each token that a layer holds beside hidden states: attention's, or the MLP's."""
        mlp = max(self._mlp_width(kind) for kind in self.layer_kinds)
        if self.block.startswith("parallel"):  # what is normed, and what attention adds to, stay until the end
            return 2 * self.hidden_size + self.attention_width + mlp
        return max(self.attention_width, mlp)

    def _mlp_width(self, kind: LayerKind) -> int:
        linears = self.linears_of(kind)
        if kind.experts is None:
            return linears["up"].n
        # The router's logits; for each expert that a token goes through its number and weight, of two 16-bit numbers
        # each, what goes in between and what comes out; and the same of the shared one.
        each = 4 + linears["up"].n + self.hidden_size
        shared = 1 + 4 + linears["shared_up"].n + self.hidden_size if kind.experts.shared_size else 0
        return kind.experts.count + kind.experts.per_token * each + shared

    @property
    def table(self) -> LinearShape:
        """The embedding table, and the LM head: [vocab_size, embedding_dim]."""
        return LinearShape(self.vocab_size, self.embedding_dim)

    def linears(self, unit: str) -> dict[str, LinearShape]:
        """The matrices of a unit that take its precision, by name."""
        if unit in ("embedding", "head"):
            return {"table": self.table}
        return self.linears_of(self.layer_kind(int(unit.removeprefix("layer."))))

    def plain_linears(self, unit: str) -> dict[str, LinearShape]:
        """The linears of a unit that are never quantized, by name.

        They are "project" of embedding and head, between embedding size and hidden size where they differ, and of a
        layer of experts "router" and "shared_gate".
        """
        if unit in ("embedding", "head"):
            if self.embedding_dim == self.hidden_size:
                return {}
            into = LinearShape(self.hidden_size, self.embedding_dim)
            return {"project": into if unit == "embedding" else LinearShape(into.k, into.n)}
        experts = self.layer_kind(int(unit.removeprefix("layer."))).experts
        if experts is None:
            return {}
        found = {"router": LinearShape(experts.count, self.hidden_size, experts.router_bias)}
        return {**found, "shared_gate": LinearShape(1, self.hidden_size)} if experts.shared_size else found

    def linear_options(self, unit: str, option: UnitPrecision) -> dict[str, Native | Precision]:
        """What each of a unit's linears has of the unit's option, by name. Raises UsageError if that names others."""
        linears = self.linears(unit)
        given = dict(option.linears) if isinstance(option, Mixed) else dict.fromkeys(linears, option)
        if list(given) != list(linears):
            raise UsageError(f"{unit} has {', '.join(linears)}, but precisions are given for {', '.join(given)}")
        return given

    def linear_precisions(self, unit: str, option: UnitPrecision) -> dict[str, Precision]:
        """The precision of each of a unit's linears, by name. Raises UsageError if the unit cannot have the option."""
        given = self.linear_options(unit, option)
        made = {name: precision for name, precision in given.items() if isinstance(precision, Precision)}
        if len(made) < len(given) and not self.stored:
            raise UsageError(
                f"{self.name} stores nothing in a precision that kernels read, so nothing of it can be native; "
                "choose bits"
            )
        if any(precision.quantizer in GIVEN for precision in made.values()):
            raise UsageError(f"{unit} cannot be quantized to {option}, which is made by others; choose native")
        return {name: made.get(name) or self.stored.get(unit, {}).get(name, W16) for name in given}

    @property
    def stored_layouts(self) -> tuple[Precision, ...]:
        """The precisions of all linears where units are native, as kernels see them; () if none is stored so."""
        native = (self.linear_precisions(unit, NATIVE).values() for unit in self.units if self.stored)
        return tuple(dict.fromkeys(precision.layout for of in native for precision in of))

    def bits(self, unit: str, option: UnitPrecision) -> float:
        """Bits of a code, on average over a unit's weights."""
        linears, precisions = self.linears(unit), self.linear_precisions(unit, option)
        sizes = {name: linear.weights for name, linear in linears.items()}
        return sum(sizes[name] * precisions[name].bits for name in sizes) / sum(sizes.values())

    def unit_bytes(self, unit: str, option: UnitPrecision, positions: int | None = None) -> int:
        """Bytes of one unit's weights: its matrices as packed, its norms and biases as float32.

        Of learned positions as many as `positions`, where a stage keeps no more; None: all.
        """
        linears = self.linears(unit)
        total = 4 * self._vector_numbers(unit, positions)
        for name, precision in self.linear_precisions(unit, option).items():
            total += linears[name].weight_bytes(precision)
        return total + sum(shape.weight_bytes(W16) for shape in self.plain_linears(unit).values())

    def _vector_numbers(self, unit: str, positions: int | None) -> int:
        """Numbers of a unit's norms, biases, sinks and learned positions."""
        norm = self.hidden_size * (2 if self.norm == "layer" else 1)
        if unit == "embedding":
            offset = self.position_offset
            stored = 0 if offset is None else self.max_positions + offset if positions is None else positions
            return stored * self.hidden_size + norm * self.embedding_norm
        if unit == "head":
            return norm * self.final_norm + self.vocab_size * ("head" in self.biases)
        shapes = (*self.linears(unit).values(), *self.plain_linears(unit).values())
        heads = {"head": (self.head_dim, self.head_dim), "row": (self.num_heads * self.head_dim, self.kv_dim)}
        small = len(self.norms) * norm + sum(shape.experts * shape.n for shape in shapes if shape.bias)
        return small + sum(heads.get(self.qk_norm or "", ())) + self.num_heads * self.attention_sinks

    def compute_dtype(self, device_kind: str) -> Dtype:
        """What a device computes in: float32 on a CPU, a 16-bit type on a GPU."""
        if device_kind == "cpu":
            return "float32"
        return "float16" if self.dtype == "float32" else self.dtype

    def kv_bytes(self, tokens: int, dtype: KvDtype) -> int:
        """Bytes of one layer's keys and values, which are of `dtype`, for `tokens` cached tokens."""
        if dtype == "int8":
            return 2 * tokens * (self.kv_dim + self.num_kv_heads * KV_SCALE_BYTES)
        return 2 * tokens * self.kv_dim * DTYPE_BYTES[dtype]
