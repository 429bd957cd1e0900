"""Stages of tiny models on the CPU, what they compute of whole sequences, and what transformers computes of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.end_to_end.transformers import cache_name
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.models.decoder_stage import DecoderStage
from llmpq.models.step import Step
from llmpq.spec import W16, Cluster, Device, ModelSpec, Plan, Precision, Stage
from tests.support.reference import finite, held
from tests.support.tiny_models import VOCAB_SIZE

CPU = torch.device("cpu")
MAX_LENGTH = 24
WIDE_CACHE = {"cache_dtype": torch.float32}  # keys and values as transformers has them
EXACT = {"weight_dtype": torch.float32, **WIDE_CACHE}


def open_model(folder: Path) -> tuple[ModelSpec, WeightSource]:
    checkpoint = resolve(str(folder))
    spec = load_spec(checkpoint)
    return spec, open_weights(checkpoint, spec)


def single_plan(spec: ModelSpec, precision: Precision = W16, max_length: int = MAX_LENGTH) -> Plan:
    return Plan.single(spec, Device("cpu0", "cpu"), precision, slots=5, max_length=max_length)


def split_plan(spec: ModelSpec, layers: Sequence[int], precision: Precision) -> Plan:
    """As many stages as `layers` has entries, with that many layers each."""
    plan = single_plan(spec, precision)
    ends = [sum(layers[: i + 1]) for i in range(len(layers))]
    stages = tuple(
        Stage(f"cpu{i}", (end - count, end), (precision,) * count)
        for i, (count, end) in enumerate(zip(layers, ends, strict=True))
    )
    return replace(
        plan,
        cluster=Cluster(tuple(Device(f"cpu{i}", "cpu") for i in range(len(layers)))),
        stages=stages,
        head=replace(plan.head, stage=len(layers) - 1),
    )


def step_of(new_tokens: dict[int, list[int]], starts: dict[int, int]) -> Step:
    """A step that appends `new_tokens` to the sequences in the slots that are its keys."""
    lengths = [len(tokens) for tokens in new_tokens.values()]
    return Step.of(list(new_tokens), lengths, [starts[slot] for slot in new_tokens], [*chain(*new_tokens.values())])


def run(stages: Sequence[DecoderStage], step: Step) -> torch.Tensor:
    hidden_states = None
    for stage in stages:
        hidden_states = stage(step, hidden_states)
    return stages[-1].logits(hidden_states).clone()  # valid until the next step only


def all_logits(
    stages: Sequence[DecoderStage], sequences: dict[int, list[int]], portions: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Logits of every position of the sequences, by slot: computed together, `portions` tokens of each at a time."""
    rows: dict[int, list[torch.Tensor]] = {slot: [] for slot in sequences}
    done = dict.fromkeys(sequences, 0)
    portion = iter(portions)
    while any(done[slot] < len(tokens) for slot, tokens in sequences.items()):
        count = next(portion, 1)
        new = {slot: tokens[done[slot] : done[slot] + count] for slot, tokens in sequences.items()}
        new = {slot: tokens for slot, tokens in new.items() if tokens}
        logits = run(stages, step_of(new, done))
        for (slot, tokens), part in zip(new.items(), logits.split([len(t) for t in new.values()]), strict=True):
            rows[slot].append(part)
            done[slot] += len(tokens)
    return {slot: torch.cat(parts) for slot, parts in rows.items()}


def random_sequences() -> dict[int, list[int]]:
    """Ragged lengths in slots out of order."""
    generator = torch.Generator().manual_seed(2)
    lengths = {3: 17, 0: 5, 4: 11}
    return {slot: torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for slot, n in lengths.items()}


@torch.no_grad()
def transformers_logits(
    model: transformers.PreTrainedModel, tokens: list[int], int8_layers: Collection[int] = ()
) -> torch.Tensor:
    """Of a sequence; `int8_layers` see keys and values as a cache of int8 has them."""
    caches = {cache_name(model): Int8Cache(model.config, int8_layers)} if int8_layers else {}
    return finite(model(input_ids=torch.tensor([tokens]), **caches).logits[0].float())


class Int8Cache(transformers.DynamicCache):
    """transformers' own, but what some layers write is rounded before, as the definition of int8 keys and values reads.

    Layers read what `update` returns, also of keys and values that are new.
    """

    def __init__(self, config: transformers.PretrainedConfig, layers: Collection[int]) -> None:
        super().__init__(config=config)
        self._int8_layers = layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *more: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self._int8_layers:
            key_states, value_states = (held(x, torch.int8).to(x.dtype) for x in (key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *more, **options)
