"""The model in 16 bits, as a reference: computed on the CPU unit by unit, so that it need not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.models.arena import Arena
from llmpq.models.decoder import DecoderLayer
from llmpq.models.decoder_stage import DecoderStage
from llmpq.models.ends import build_embedding, build_head
from llmpq.models.kv_cache import KVCache
from llmpq.models.loading import Loader
from llmpq.models.rotary import rotary_tables
from llmpq.models.step import Step
from llmpq.progress import Notify, counted, silent
from llmpq.runtime.request import check_prompts
from llmpq.spec import W16, ModelSpec


class ReferenceModel:
    """What the model itself makes of `windows` of tokens, with the kernels and the float32 activations of a served one.

    Held are, of the whole text, the hidden states before the head, float32 [t, hidden_size]; else one unit's weights.
    Raises UsageError for windows that are empty, longer than the model's context, or of tokens that it has not.
    """

    @torch.inference_mode()
    def __init__(
        self, spec: ModelSpec, source: WeightSource, windows: Sequence[Sequence[int]], notify: Notify = silent
    ) -> None:
        check_prompts(windows, spec.vocab_size, spec.max_positions, f"the context of {spec.name}", output_len=0)
        self.windows = windows
        dtype, device, longest = torch.float32, torch.device("cpu"), max(map(len, windows))
        loader = Loader(spec, source, device, None, None)
        steps = [Step.of([0], [len(window)], [0], window) for window in windows]
        embedding = build_embedding(loader, loader.table("embedding", W16), dtype, longest)
        cache = KVCache(1, 1, longest, spec.num_kv_heads, spec.head_dim, dtype, dtype, device)
        rotary, arena = rotary_tables(spec, longest, dtype, device), Arena(spec, longest, dtype, device)
        self._hidden_states = [embedding(step.tokens, step.sequences, arena).clone() for step in steps]
        del embedding
        layer_done = counted(notify, "computing with 16 bits, for comparison", spec.num_layers)
        for i in range(spec.num_layers):
            layer = DecoderLayer(spec, loader, i, W16)
            stage = DecoderStage([layer], None, None, cache, rotary, arena)
            for step, hidden_states in zip(steps, self._hidden_states, strict=True):
                hidden_states.copy_(stage(step, hidden_states))
            layer_done()
        self._vocab_size = spec.vocab_size
        self._head = build_head(loader, loader.table("head", W16))

    @torch.inference_mode()
    def logits(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, vocab_size]: after the tokens `start` to `stop` of a window."""
        hidden_states = self._hidden_states[window][start:stop]
        return self._head(hidden_states, torch.empty(len(hidden_states), self._vocab_size))
