"""What a checkpoint must have: which rows of which tensors make up each part of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from llmpq.checkpoint.family import Family, Mixture
from llmpq.spec import LinearShape, ModelSpec

Part = tuple[str, str]  # unit, and tensor within it: ("layer.3", "qkv.weight"), ("head", "norm.bias")
Places = slice | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that follow each other in a part: `take` of each `stride` of its rows, from row `first` on."""

    name: str  # of the tensor, in transformers' words
    shape: tuple[int, ...]  # of the piece: [n, k], or [n] of a vector
    tensor_shape: tuple[int, ...]  # of the tensor
    first: int = 0
    take: int = 0
    stride: int = 0  # 0: all rows follow each other
    matrix: int = 0  # which of a tensor [count, k, n] of transposed matrices
    transposed: bool = False  # the tensor is [..., k, n], and its rows here are its columns
    plus: float = 0.0  # what is added to its numbers

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Piece:
        """All of a tensor."""
        return cls(name, shape, shape)

    def places(self, start: int, stop: int) -> Places:
        """Which rows of the tensor (of a vector: which of its numbers) the piece's rows start..stop are."""
        if not self.stride:
            return slice(self.first + start, self.first + stop)
        rows = np.arange(start, stop)
        return self.first + rows // self.take * self.stride + rows % self.take

    @property
    def linear_shape(self) -> tuple[int, ...]:
        """n, k of the linear whose tensor it is, however that lies."""
        return self.tensor_shape[::-1] if self.transposed else self.tensor_shape

    @property
    def label(self) -> str:
        """A name that no other piece of the model has."""
        return f"{self.name} {self.matrix} {self.first}" if self.matrix or self.first else self.name


def rows_of_tensors(pieces: Sequence[Piece]) -> dict[str, npt.NDArray[np.int64]]:
    """The tensors that a part's pieces are of, and which of the part's rows is each row of a tensor, in its order."""
    rows: dict[str, list[npt.NDArray[np.int64]]] = {}
    places: dict[str, list[npt.NDArray[np.int64]]] = {}
    start = 0
    for piece in pieces:
        n = piece.shape[0]
        at = piece.places(0, n)
        places.setdefault(piece.name, []).append(np.arange(at.start, at.stop) if isinstance(at, slice) else at)
        rows.setdefault(piece.name, []).append(np.arange(start, start + n))
        start += n
    return {name: np.concatenate(of)[np.concatenate(places[name]).argsort()] for name, of in rows.items()}


def decoder_tensors(spec: ModelSpec, family: Family) -> dict[Part, tuple[Piece, ...]]:
    """Part of the decoder -> the pieces of tensors whose rows it has, in order.

    Parts are `table`, `positions`, `norm` and `project` of the embedding; of a layer its linears, the norms of
    ModelSpec.norms, `q_norm`, `k_norm` and `sinks`, `router` and `shared_gate`; `norm`, `project` and `table` of the
    head. A tied head's table is the embedding's. What there is of each expert follows in the order of experts.
    """
    tensors: dict[Part, tuple[Piece, ...]] = {}

    def add(unit: str, part: str, names: Sequence[str], shape: LinearShape) -> None:
        pieces = _pieces(names, part, shape, spec, family)
        tensors[unit, f"{part}.weight"] = tuple(replace(piece, name=f"{piece.name}.weight") for piece in pieces)
        if shape.bias:
            tensors[unit, f"{part}.bias"] = tuple(
                replace(
                    piece, name=f"{piece.name}.bias", shape=piece.shape[:1], tensor_shape=_rows(piece), transposed=False
                )
                for piece in pieces
            )

    def add_norm(
        unit: str, part: str, name: str, size: int = spec.hidden_size, biased: bool = spec.norm == "layer"
    ) -> None:
        for kind in ("weight", "bias") if biased else ("weight",):
            piece = Piece.whole(f"{name}.{kind}", (size,))
            tensors[unit, f"{part}.{kind}"] = (replace(piece, plus=family.norm_plus if kind == "weight" else 0.0),)

    add("embedding", "table", [family.table], spec.table)
    if spec.position_offset is not None:
        rows = spec.max_positions + spec.position_offset
        whole = Piece.whole(f"{family.positions}.weight", (rows, spec.hidden_size))
        tensors["embedding", "positions.weight"] = (whole,)
    if spec.embedding_norm:
        add_norm("embedding", "norm", family.embedding_norm)
    for unit, name in (("embedding", family.project_in), ("head", family.project_out)):
        if projection := spec.plain_linears(unit).get("project"):
            add(unit, "project", [name], projection)
    for i in range(spec.num_layers):
        unit, prefix = f"layer.{i}", family.layer.format(i)
        experts = spec.layer_kind(i).experts
        of_experts = {} if experts is None or family.mixture is None else family.mixture.tensors
        for part, shape in (spec.linears(unit) | spec.plain_linears(unit)).items():
            names = [prefix + name for name in of_experts.get(part) or family.linears[part]]
            if family.mixture is not None and part in of_experts and shape.experts > 1:
                weights, biases = _expert_pieces(names, part, shape, family.mixture)
                tensors[unit, f"{part}.weight"] = weights
                if shape.bias:
                    tensors[unit, f"{part}.bias"] = biases
            else:
                add(unit, part, names, shape)
        for part in spec.norms:
            add_norm(unit, part, prefix + family.norm_of(spec, part))
        if spec.attention_sinks:
            tensors[unit, "sinks.weight"] = (Piece.whole(prefix + family.sinks, (spec.num_heads,)),)
        if spec.qk_norm:
            heads = {"q_norm": spec.num_heads, "k_norm": spec.num_kv_heads}
            for part, count in heads.items():
                size = spec.head_dim * (count if spec.qk_norm == "row" else 1)
                add_norm(unit, part, prefix + family.norms[part], size, biased=False)
    if spec.final_norm:
        add_norm("head", "norm", family.final_norm)
    add("head", "table", [family.table if spec.tied_embeddings else family.head], spec.table)
    if "head" in spec.biases:
        tensors["head", "table.bias"] = (Piece.whole(f"{family.head}.bias", (spec.vocab_size,)),)
    return tensors


def _rows(piece: Piece) -> tuple[int]:
    """How many numbers the bias beside a piece's tensor has."""
    return (piece.tensor_shape[1 if piece.transposed else 0],)


def _pieces(names: Sequence[str], part: str, shape: LinearShape, spec: ModelSpec, family: Family) -> list[Piece]:
    """The pieces of a linear that the tensors `names` make up."""
    q_dim, kv_dim = spec.num_heads * spec.head_dim, spec.kv_dim
    qkv = [q_dim, kv_dim, kv_dim] if part == "qkv" else [shape.n]
    if len(names) == 1:
        whole = Piece.whole(names[0], (shape.n, shape.k))
        if family.transposed and part in family.linears:
            whole = replace(whole, tensor_shape=(shape.k, shape.n), transposed=True)
        if part != "qkv" or not family.grouped_qkv:
            return [whole]
        group = shape.n // spec.num_kv_heads
        firsts = (0, q_dim // spec.num_kv_heads, group - spec.head_dim)
        takes = (firsts[1], spec.head_dim, spec.head_dim)
        return [
            replace(whole, shape=(n, shape.k), first=first, take=take, stride=group)
            for n, first, take in zip(qkv, firsts, takes, strict=True)
        ]
    rows = qkv if part == "qkv" else [shape.n // len(names)] * len(names)
    return [Piece.whole(name, (n, shape.k)) for name, n in zip(names, rows, strict=True)]


def _expert_pieces(
    names: Sequence[str], part: str, shape: LinearShape, mixture: Mixture
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """The pieces of a linear of all experts, and of its biases: expert by expert what the tensors `names` hold."""
    rows, k, count = shape.n // len(names), shape.k, shape.experts
    halves = 2 if mixture.alternating and part == "up" else 1
    take, stride = (1, 2) if halves == 2 else (0, 0)
    weights, biases = [], []
    for expert, name in product(range(count), names):
        weight, bias = (name.format(expert) + mixture.suffixes[kind] for kind in ("weight", "bias"))
        if mixture.layout == "each":
            weights.append(Piece.whole(weight, (rows, k)))
            biases.append(Piece.whole(bias, (rows,)))
            continue
        for half in range(halves):
            first = expert * rows + half
            piece = Piece(weight, (rows // halves, k), (count, rows, k), first, take, stride)
            if mixture.layout == "columns":
                piece = replace(piece, tensor_shape=(count, k, rows), first=half, matrix=expert, transposed=True)
            weights.append(piece)
            biases.append(Piece(bias, (rows // halves,), (count, rows), first, take, stride))
    return tuple(weights), tuple(biases)
