"""DecoderStage: the units of the decoder that a plan gives to one stage, with their KV cache, and how they are run.

On a CPU that is by a program (llmpq/kernels/program.py) which is recorded from the modules once; on a GPU by graphs
(llmpq/models/decode_graph.py) of decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from llmpq import kernels
from llmpq.checkpoint.weights import WeightSource
from llmpq.models.arena import Arena
from llmpq.models.decode_graph import Capture, CudaCapture, DecodeGraph, graph_sizes
from llmpq.models.decoder import DecoderLayer, ForwardContext
from llmpq.models.ends import Embedding, Head, build_embedding, build_head
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.models.loading import Loader
from llmpq.models.mixture import Mixture
from llmpq.models.rotary import Rotary, rotary_tables
from llmpq.models.step import Step
from llmpq.models.units import Units, forms_of, weights_of
from llmpq.spec import ModelSpec, Plan, Rope, UsageError


class DecoderStage(nn.Module):
    """The layers of one stage, the embedding on the first, the head on the last; made by `build_stage`."""

    __call__: Callable[..., torch.Tensor]

    def __init__(
        self,
        layers: list[DecoderLayer],
        embedding: Embedding | None,
        head: Head | None,
        kv_cache: KVCache,
        rotary: Mapping[Rope | None, Rotary | None],
        arena: Arena,
        *,
        recorded: bool = False,
    ) -> None:
        """With `recorded`, what the modules compute is recorded at the first step and from then on run in one call.

        The results are the same to the bit. All operations must be of the backend "cpu".
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.embedding = embedding
        self.head = head
        self.kv_cache = kv_cache
        self._rotary, self._arena = rotary, arena
        self._recorded = recorded
        self._programs: dict[Callable[..., object], kernels.Program] = {}
        self._graphs: tuple[DecodeGraph[Any], ...] = ()

    @property
    def is_recorded(self) -> bool:
        """Whether its steps run as recorded programs."""
        return self._recorded

    @property
    def is_graphed(self) -> bool:
        """Whether its decode steps are replayed as graphs."""
        return bool(self._graphs)

    @property
    def device(self) -> torch.device:
        return self._arena.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._arena.dtype

    @torch.inference_mode()
    def forward(self, step: Step, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """hidden_states [t, hidden_size] after this stage's layers, in its compute dtype.

        The first stage embeds the step's tokens; the others take the previous one's result in `hidden_states`, any
        floating dtype, and leave it as it is. The result is valid until the next step. Raises ValueError for a step of
        more tokens than the stage's arena has room for, or of sequences that its cache has no room for.
        """
        entered = self._enter(step, hidden_states)
        result: torch.Tensor
        if self.head is None and (graph := self._graph(step)) is not None:
            result = graph.replay(step)
            return result[: step.num_tokens]
        if not self._recorded:
            return self._compute(step.tokens, step.sequences, entered)
        result = self._run(self._compute, step, step.tokens, entered)
        return result.as_strided((step.num_tokens, result.shape[1]), result.stride())

    @torch.inference_mode()
    def next_tokens(
        self,
        step: Step,
        hidden_states: torch.Tensor | None = None,
        *,
        tokens: torch.Tensor | None = None,
        seconds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest next token of each sequence, int64 [s], and the logits of all, [s, vocab_size] in its dtype.

        As `forward` otherwise, but for the last stage only. Both are valid until the next step. `tokens`, int64 [t] on
        the stage's device, are taken in place of the step's, and must be rows of the table. In a recorded stage
        `seconds` (float64) gets how long each of `operations` took.
        """
        entered, rows = self._enter(step, hidden_states), step.num_sequences
        if (graph := self._graph(step)) is not None:
            next_tokens, logits = graph.replay(step, tokens)
            return next_tokens[:rows], logits[:rows]
        tokens = step.tokens if tokens is None else tokens
        if not self._recorded or rows > self._arena.logit_rows:
            return self._compute_next(tokens, step.sequences, entered)
        self._run(self._compute_next, step, tokens, entered, seconds)
        return self._arena.next_tokens(rows), self._arena.logits(rows)

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations of `next_tokens`, in order, once it has been recorded."""
        return self._programs[self._compute_next].names

    @torch.inference_mode()
    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab_size] of rows of what `forward` returned; valid until the next call."""
        if self.head is None:
            raise ValueError("this stage has no LM head; only the last one does")
        self._arena.begin(len(hidden_states))
        return self.head(hidden_states, self._arena.logits(len(hidden_states)), self._arena).float()

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], capture: Capture) -> None:
        """From now on, take decode steps of up to max(sizes) sequences by graphs, one for each of these sizes.

        All operations must be on the device alone: of the host they may ask how many sequences there are, and no more.
        """
        compute = self._compute if self.head is None else self._compute_next

        def work(tokens: torch.Tensor, sequences: kernels.Sequences) -> object:
            self._arena.begin(sequences.tokens)
            entered = None if self.embedding is not None else self._arena.hidden_states(sequences.tokens)
            return compute(tokens, sequences, entered)

        self._arena.begin(max(sizes))
        self._arena.hidden_states(max(sizes)).zero_()  # no step has filled the rows of absent sequences yet
        embeds = self.embedding is not None
        # The largest first: what the others need then has room in the memory that it leaves in their pool.
        graphs = [
            DecodeGraph(size, work, self.device, capture, embeds=embeds, columns=self.kv_cache.slot_blocks)
            for size in sorted(sizes, reverse=True)
        ]
        self._graphs = tuple(reversed(graphs))

    def _graph(self, step: Step) -> DecodeGraph[Any] | None:
        """The smallest graph that takes a step, if any does."""
        if not step.sequences.is_decode:
            return None
        return next((graph for graph in self._graphs if graph.size >= step.num_sequences), None)

    def _enter(self, step: Step, hidden_states: torch.Tensor | None) -> torch.Tensor | None:
        """A step begins: what comes from the previous stage is in the arena then."""
        self.kv_cache.check(step.sequences)
        self._arena.begin(step.num_tokens)
        if self.embedding is not None:
            if not self._recorded:  # a program looks itself
                kernels.check_ids(step.tokens, self.embedding.table)
            return None
        if hidden_states is None:
            raise ValueError("hidden_states is missing; only the first stage embeds tokens itself")
        return self._arena.hidden_states(step.num_tokens).copy_(hidden_states)

    def _run(
        self,
        compute: Callable[..., object],
        step: Step,
        tokens: torch.Tensor,
        entered: torch.Tensor | None,
        seconds: torch.Tensor | None = None,
    ) -> Any:
        """What `compute` returned when it was recorded, for this step's tokens now."""
        program = self._programs.get(compute)
        if program is None:
            self._programs[compute] = program = kernels.Program(lambda: compute(tokens, step.sequences, entered))
        program.run(step.num_tokens, tokens=tokens, sequences=step.sequences, seconds=seconds)
        return program.result

    def _compute(
        self, tokens: torch.Tensor, sequences: kernels.Sequences, hidden_states: torch.Tensor | None
    ) -> torch.Tensor:
        """hidden_states after the layers; those before them are in the arena, unless they are embedded."""
        if self.embedding is not None:
            hidden_states = self.embedding(tokens, sequences, self._arena)
        assert hidden_states is not None
        at = ForwardContext(sequences, self._rotary, self._arena)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, at, self.kv_cache, i)
        return hidden_states

    def _compute_next(
        self, tokens: torch.Tensor, sequences: kernels.Sequences, hidden_states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens and the logits."""
        if self.head is None:
            raise ValueError("this stage has no LM head; only the last one does")
        arena, rows = self._arena, len(sequences.slots)
        x = kernels.last_rows(self._compute(tokens, sequences, hidden_states), sequences, arena.last_rows(rows))
        logits = self.head(x, arena.logits(rows), arena)
        return kernels.argmax(logits, arena.next_tokens(rows)), logits


@torch.inference_mode()
def build_stage(
    spec: ModelSpec,
    source: WeightSource,
    plan: Plan,
    stage_index: int,
    device: torch.device,
    backend: str | None = None,
    *,
    weight_dtype: torch.dtype | None = None,
    cache_dtype: torch.dtype | None = None,
    arena: Arena | None = None,
    units: Units | None = None,
    eager: bool = False,
) -> DecoderStage:
    """Load one stage of a plan, unit by unit, reading nothing that belongs to another.

    `backend` is that of the kernels, None for the best on the device. Units that are not quantized get `weight_dtype`:
    the model's own by default; float32, for comparisons, is the reference backend's. Keys and values are kept in
    `cache_dtype`, by default the stage's own. `arena` is the stage's, by default a new one. Those of `units` that the
    stage has in the same form are not loaded; what is loaded is added to them. Stages on the backend "cpu" are
    recorded, and the decode steps of those whose operations are kernels of a GPU are captured, unless they are to be
    `eager`. Raises UsageError for a plan of another model or for more positions than the model has.
    """
    plan.check_model(spec)
    if plan.max_length > spec.max_positions:
        raise UsageError(
            f"{spec.name} can attend to {spec.max_positions} positions, but the plan has slots of {plan.max_length}"
        )
    stage = plan.stages[stage_index]
    dtype: torch.dtype = getattr(torch, stage.compute_dtype)
    loader = Loader(spec, source, device, backend, weight_dtype, stage.activations)
    units = Units() if units is None else units
    forms = forms_of(spec, plan, stage_index)
    embedding = head = None
    # A tied table is stored once if both its users are here, in one precision.
    shared = spec.tied_embeddings and plan.head == plan.embedding
    if "embedding" in forms:
        held = units.find("head", forms["head"]) if shared else None

        def load_embedding() -> Embedding:
            if isinstance(held, Head):
                return build_embedding(loader, held.table.weight, dtype, plan.max_length)
            table = loader.table("embedding", plan.embedding.precision)
            return build_embedding(loader, table, dtype, plan.max_length)

        embedding = units.get("embedding", forms["embedding"], load_embedding)
    layers = [
        units.get(f"layer.{i}", forms[f"layer.{i}"], partial(DecoderLayer, spec, loader, i, precision))
        for i, precision in zip(range(*stage.layers), stage.precisions, strict=True)
    ]
    if "head" in forms:

        def load_head() -> Head:
            table = embedding.table if shared and embedding else loader.table("head", plan.head.precision)
            return build_head(loader, table, stage.activations)

        head = units.get("head", forms["head"], load_head)
    cache_dtype = cache_dtype or getattr(torch, stage.kv_dtype)
    kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    cache = KVCache(
        len(layers),
        plan.slots,
        plan.max_length,
        kv_heads,
        head_dim,
        cache_dtype,
        dtype,
        device,
        [plan.cached_tokens(spec.layer_kind(i)) for i in range(*stage.layers)],
        plan.longest_query(spec),
        plan.cache_blocks,
    )
    rotary = rotary_tables(spec, plan.max_length, dtype, device)
    arena = arena or Arena.of_stage(spec, plan, stage_index, device)
    parts = [part for part in (embedding, *layers, head) if part is not None]
    weights = [weight for part in parts for weight in weights_of(part)]
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, QuantLinear) and module.bias is not None:
            module.bias = _as_multiplied(module.bias, module.weight, dtype)
        elif isinstance(module, ExpertLinear) and module.biases is not None:
            module.biases = _as_multiplied(module.biases, module.weights[0], dtype)
    operations = kernels.cache_backend(device, dtype)  # the backend of whatever is no product
    backends = {operations, *(weight.backend for weight in weights)}
    recorded = not eager and backends == {"cpu"}
    built = DecoderStage(layers, embedding, head, cache, rotary, arena, recorded=recorded)
    on_gpu = device.type == "cuda" and operations == "triton" and backends <= {"cuda", "triton"}
    if not eager and on_gpu and (sizes := capturable(built, graph_sizes(min(plan.decode_microbatch, plan.slots)))):
        built.capture(sizes, CudaCapture(device))
    return built


def capturable(part: nn.Module, sizes: Sequence[int]) -> tuple[int, ...]:
    """The numbers of sequences whose decode steps wait for nothing: the host asks for the experts of many tokens."""
    mixtures = [module for module in part.modules() if isinstance(module, Mixture)]
    return tuple(size for size in sizes if not any(mixture.waits(size) for mixture in mixtures))


def _as_multiplied(bias: torch.Tensor, weight: kernels.PreparedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A bias as each product of activations in `dtype` would make it, in one more launch."""
    return bias.to(dtype) if dtype in weight.module.ACTIVATION_DTYPES else bias
