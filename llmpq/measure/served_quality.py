"""What a plan's weights lose on a text, as they are served: on one device, whichever devices the plan is for."""

from __future__ import annotations

from llmpq.checkpoint.model_files import Model
from llmpq.checkpoint.weights import open_weights
from llmpq.host_limits import usable_cores
from llmpq.measure.divergence import Divergence, measure_divergence
from llmpq.measure.perplexity import WINDOW, windows_of
from llmpq.measure.quantized_model import as_served
from llmpq.measure.reference_model import ReferenceModel
from llmpq.progress import Notify, silent
from llmpq.runtime.engine import Engine
from llmpq.spec import W16, ActivationMode, Device, Plan


class TextQuality:
    """Compares plans with the model in 16 bits, which is computed once, on `max_tokens` of a text, from all over it."""

    def __init__(self, model: Model, text: str, max_tokens: int, notify: Notify = silent) -> None:
        self._model, self._notify = model, notify
        self._window = min(WINDOW, model.spec.max_positions)
        windows = windows_of(model.tokenizer.encode(text), self._window, max_tokens)
        self.tokens = sum(len(window) - 1 for window in windows)
        self._reference = ReferenceModel(model.spec, open_weights(model.checkpoint, model.spec), windows, notify)

    def of(self, plan: Plan) -> Divergence:
        """That of a plan's precisions, in its mode of activations and with its KV cache's bits.

        Where stages differ in these, with the fewest in all layers, which lose no less.
        """
        spec, mode = self._model.spec, mode_of(plan)
        device = Device("cpu0", "cpu", threads=usable_cores())
        alone = Plan.single(spec, device, W16, slots=1, max_length=self._window, activations=mode, kv_bits=plan.kv_bits)
        alone = alone.with_precisions([plan.precision(unit) for unit in spec.units])
        weights, alone = as_served(self._model, alone, self._notify)
        with Engine(alone, weights.checkpoint, weights.spec, logits=True, notify=self._notify) as engine:
            return measure_divergence(engine.logits, self._reference, self._notify)[1]


def mode_of(plan: Plan) -> ActivationMode:
    """How a plan multiplies: as its first CPU stage that quantizes activations, if one does."""
    return next((stage.activations for stage in plan.stages if stage.activations != "a16"), "a16")
