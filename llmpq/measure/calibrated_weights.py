"""Quantizing for the inputs that linears get: one pass of a calibration text through the model, layer by layer.

Two streams of hidden states go through each layer: that of the model as it is, and that of the layers quantized so far.
A linear of the second is quantized when its input arrives, and multiplies it at once: what comes after is quantized for
what it will really get. Held are one layer, and what goes into its linears for all tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from llmpq.checkpoint.weights import WeightSource, floating
from llmpq.kernels import prepare
from llmpq.models.arena import Arena
from llmpq.models.decoder import DecoderLayer, DecoderStage, build_embedding
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import QuantLinear
from llmpq.models.loading import Loader
from llmpq.models.rotary import Rotary
from llmpq.models.step import Step
from llmpq.progress import Notify, counted, silent
from llmpq.quant import QuantTensor
from llmpq.quant.gptq import InputStatistics, gptq
from llmpq.spec import W16, ModelSpec, Precision, UsageError

SEQUENCES, SEQUENCE_LENGTH = 32, 512  # of calibration text


@torch.inference_mode()
def calibrated_layers(
    spec: ModelSpec,
    source: WeightSource,
    precision: Precision,
    token_ids: Sequence[int],
    notify: Notify = silent,
) -> Iterator[dict[str, QuantTensor]]:
    """The fused linears of each decoder layer in turn, quantized to `precision` for the inputs that they get.

    `token_ids` are read in at most SEQUENCES equal pieces from all over the text. Raises UsageError if there are none.
    """
    length = min(SEQUENCE_LENGTH, len(token_ids), spec.max_positions)
    if length < 1:
        raise UsageError("the calibration text is empty; give a longer one")
    pieces = len(token_ids) // length
    count = min(SEQUENCES, pieces)
    starts = [i * pieces // count * length for i in range(count)]
    tokens = [token for start in starts for token in token_ids[start : start + length]]
    step = Step.of(range(count), [length] * count, [0] * count, tokens)
    device, dtype = torch.device("cpu"), torch.float32
    loader = Loader(spec, source, device, None, None)
    cache = KVCache(1, count, length, spec.num_kv_heads, spec.head_dim, dtype, device)
    rotary, arena = Rotary.of(spec, length, dtype, device), Arena(spec, count * length, dtype, device)
    exact = build_embedding(loader, W16, dtype, length)(step.tokens, step.positions, dtype)
    served = exact
    layer_done = counted(notify, f"quantizing to {precision}", spec.num_layers)
    for i in range(spec.num_layers):
        layer = DecoderLayer(spec, loader, i, W16)
        stage = DecoderStage([layer], None, None, cache, rotary, arena, dtype, device)
        watched = _Layer(spec, source, i, precision, layer)
        exact = watched.observe(stage, step, exact)
        served = watched.quantize(stage, step, served)
        yield watched.quantized
        layer_done()


class _Layer:
    """One layer's linears: what goes into them in the model as it is, then what does so as they are quantized."""

    def __init__(
        self, spec: ModelSpec, source: WeightSource, index: int, precision: Precision, layer: DecoderLayer
    ) -> None:
        self.quantized: dict[str, QuantTensor] = {}
        self._spec, self._source, self._precision, self._layer = spec, source, precision, layer
        self._unit = f"layer.{index}"
        self._inputs: dict[str, torch.Tensor] = {}  # [t, k], of the model as it is
        self._residuals: dict[str, torch.Tensor] = {}  # [t, hidden_size] that an output is added to

    def observe(self, stage: DecoderStage, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [t, hidden_size] after the layer as it is."""
        handles = [
            getattr(self._layer, name).register_forward_pre_hook(partial(self._note, name))
            for name in self._spec.layer_linears
        ]
        self._residuals["out"] = hidden_states
        handles.append(self._layer.mlp_norm.register_forward_pre_hook(self._note_middle))
        after: torch.Tensor = stage(step, hidden_states).clone()
        for handle in handles:
            handle.remove()
        return after

    def _note(self, name: str, module: QuantLinear, arguments: tuple[torch.Tensor, ...]) -> None:
        self._inputs[name] = arguments[0].clone()

    def _note_middle(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._residuals["down"] = arguments[0].clone()

    def quantize(self, stage: DecoderStage, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, each of whose linears is quantized as its input arrives."""
        if self._spec.norm_first:
            self._residuals["out"] = self._residuals["out"] - hidden_states
            self._layer.mlp_norm.register_forward_pre_hook(self._middle_arrives)
        else:
            self._residuals.clear()
        for name in self._spec.layer_linears:
            getattr(self._layer, name).register_forward_pre_hook(partial(self._input_arrives, name))
        after: torch.Tensor = stage(step, hidden_states).clone()
        return after

    def _middle_arrives(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._residuals["down"] -= arguments[0]

    def _input_arrives(self, name: str, module: QuantLinear, arguments: tuple[torch.Tensor, ...]) -> None:
        x, exact = arguments[0], self._inputs.pop(name)
        rows = self._source.rows(self._unit, f"{name}.weight")
        weight = torch.cat([floating(portion).float() for portion in rows])
        second_moment = _moment(x, x)
        drift = weight.double() @ _moment(exact.sub_(x), x)
        if name in self._residuals:
            drift += _moment(self._residuals.pop(name), x)
        statistics = InputStatistics(second_moment, drift)
        model_dtype: torch.dtype = getattr(torch, self._spec.dtype)
        self.quantized[name] = gptq(weight, self._precision, model_dtype, statistics)
        module.weight = prepare(self.quantized[name])


def _moment(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean of a b^T over tokens, float64 [width of a, width of b]."""
    parts = zip(a.split(1024), b.split(1024))
    return sum((p.T @ q).double() for p, q in parts) / len(a)  # type: ignore[return-value]
