"""CUDA graphs without a GPU: their work is done again, and finds a step's sequences where a kernel would.

And stages with and without graphs, which generate the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmpq.kernels import CacheLayer, Sequences
from llmpq.kernels.backends import reference
from llmpq.models.decode_graph import graph_sizes
from llmpq.models.decoder_stage import DecoderStage, build_stage
from llmpq.spec import ModelSpec, Plan
from tests.support.decoding import CPU, EXACT, open_model, single_plan, step_of
from tests.support.tiny_models import VOCAB_SIZE

SLOTS = 11
SIZES = (1, 2, 4, 8, 11)
MAX_LENGTH = 24  # of tests.support.decoding, too


class Touched(TorchDispatchMode):
    """Keeps all tensors that operations take and return: what work is done with."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        self.tensors += [leaf for leaf in tree_leaves((arguments, named, result)) if isinstance(leaf, torch.Tensor)]
        return result

    @property
    def memory(self) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in self.tensors}


class CaptureHazards(TorchFunctionMode):
    """Finds what cannot be captured: looks at what tensors hold, and tensors made of what the host holds.

    What Triton's interpreter does in a kernel does not count.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_kernel = False
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def launched(*arguments: Any, **named: Any) -> Any:
            self._in_kernel = True
            try:
                return launch(*arguments, **named)
            finally:
                self._in_kernel = False

        monkeypatch.setattr(GridExecutor, "__call__", launched)

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        indices = arguments[1:2] if name in ("__getitem__", "__setitem__") else ()
        listed = any(
            isinstance(index, list) or (isinstance(index, torch.Tensor) and index.dtype == torch.bool)
            for index in tree_leaves(indices, is_leaf=lambda leaf: isinstance(leaf, list))
        )
        if not self._in_kernel and (listed or name in _HAZARDS):
            self.found.append(f"{name} of a list or mask" if listed else name)
        return function(*arguments, **(named or {}))


_HAZARDS = {"tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "repeat_interleave", "pin_memory"}
_HAZARDS |= {"tensor", "as_tensor", "from_numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}


class Rerun:
    """A Capture without a GPU. `replayed` has the number of each graph that was replayed, in the order of capture."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed: list[int] = []
        self.working = False
        self.touched = Touched()

    def __call__(self, work: Callable[[], object]) -> Callable[[], object]:
        number = self.captured
        self.captured += 1
        with self.touched:
            work()

        def replay() -> None:
            self.replayed.append(number)
            self.working = True
            work()
            self.working = False

        return replay


def _present(of: Sequences, device: torch.device) -> tuple[Sequences, torch.Tensor]:
    """The sequences that a device finds, and which tokens are theirs."""
    at = of.on(device)
    here = at.context_lens > 0
    tables = None if at.tables is None else at.tables[here]
    return Sequences(at.slots[here], at.query_starts.diff()[here], at.context_lens[here], tables), at.positions >= 0


def read_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference backend, with a step's sequences read from where a GPU has them. Absent ones are 0."""
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    attend, store = reference.attention, reference.rotate_and_store

    def attention(
        q: torch.Tensor, cache: CacheLayer, of: Sequences, scale: float, out: torch.Tensor, *options: Any
    ) -> None:
        present, tokens = _present(of, q.device)
        found = torch.empty_like(q[tokens])
        attend(q[tokens], cache, present, scale, found, *options)
        out.zero_()[tokens] = found

    def rotate_and_store(qkv: torch.Tensor, cache: CacheLayer, of: Sequences, rotary: Any) -> None:
        present, tokens = _present(of, qkv.device)
        rows = qkv[tokens]
        store(rows, cache, present, rotary)
        qkv[tokens] = rows

    monkeypatch.setattr(reference, "attention", attention)
    monkeypatch.setattr(reference, "rotate_and_store", rotate_and_store)


def sizes(capture: Rerun) -> list[int]:
    """How many sequences the graphs that were replayed are for, where SIZES were captured."""
    return [sorted(SIZES, reverse=True)[number] for number in capture.replayed]


def plan_of(spec: ModelSpec) -> Plan:
    return replace(
        single_plan(spec), slots=SLOTS, max_length=MAX_LENGTH, decode_microbatch=SLOTS, prefill_microbatch=SLOTS
    )


def eager_stage(folder: Path, **options: Any) -> DecoderStage:
    spec, source = open_model(folder)
    return build_stage(spec, source, plan_of(spec), 0, CPU, eager=True, **(options or EXACT))


def graphed_stage(folder: Path, capture: Rerun, **options: Any) -> DecoderStage:
    stage = eager_stage(folder, **options)
    stage.capture(graph_sizes(SLOTS), capture)
    return stage


def prompts() -> dict[int, list[int]]:
    """One in each slot, of different lengths; the slots in no order."""
    draw = random.Random(3)
    slots = draw.sample(range(SLOTS), SLOTS)
    return {slot: [draw.randrange(VOCAB_SIZE) for _ in range(1 + 5 * i % 9)] for i, slot in enumerate(slots)}


def rounds() -> list[list[int]]:
    """Decode steps of 1 to SLOTS sequences: which, in what order."""
    draw = random.Random(4)
    return [draw.sample(range(SLOTS), count) for count in draw.sample(range(1, SLOTS + 1), SLOTS)]


def generate(
    stages: Sequence[DecoderStage],
    prompts: dict[int, list[int]],
    rounds: Sequence[Sequence[int]],
    forced: dict[int, list[int]] | None = None,
) -> tuple[dict[int, list[int]], list[torch.Tensor]]:
    """All tokens of each slot, prompts included, the likeliest or the `forced` ones; and the logits of each step."""
    texts = {slot: list(prompt) for slot, prompt in prompts.items()}
    logits = []
    for i, chosen in enumerate([list(prompts), *rounds]):
        new = {slot: texts[slot] if i == 0 else texts[slot][-1:] for slot in chosen}
        step = step_of(new, {slot: len(texts[slot]) - len(tokens) for slot, tokens in new.items()})
        hidden_states = None
        for stage in stages[:-1]:
            hidden_states = stage(step, hidden_states)
        tokens, found = stages[-1].next_tokens(step, hidden_states)
        logits.append(found.clone().cpu())
        for slot, token in zip(chosen, tokens.tolist(), strict=True):
            texts[slot].append(token if forced is None else forced[slot][len(texts[slot])])
    return texts, logits
