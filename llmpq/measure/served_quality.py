"""What a plan's weights and KV caches lose on a text, as they are served: here, whichever devices the plan is for."""

from __future__ import annotations

import itertools
from dataclasses import replace

from llmpq.checkpoint.model_files import Model
from llmpq.checkpoint.weights import open_weights
from llmpq.host_limits import usable_cores
from llmpq.measure.divergence import Divergence, measure_divergence
from llmpq.measure.perplexity import WINDOW, windows_of
from llmpq.measure.quantized_model import as_served
from llmpq.measure.reference_model import ReferenceModel
from llmpq.progress import Notify, silent
from llmpq.runtime.engine import Engine
from llmpq.spec import W16, ActivationMode, Cluster, Device, ModelSpec, Plan


class TextQuality:
    """Compares plans with the model in 16 bits, which is computed once, on `max_tokens` of a text, from all over it."""

    def __init__(self, model: Model, text: str, max_tokens: int, notify: Notify = silent) -> None:
        self._model, self._notify = model, notify
        self._window = min(WINDOW, model.spec.max_positions)
        windows = windows_of(model.tokenizer.encode(text), self._window, max_tokens)
        self.tokens = sum(len(window) - 1 for window in windows)
        self._reference = ReferenceModel(model.spec, open_weights(model.checkpoint, model.spec), windows, notify)

    def of(self, plan: Plan) -> Divergence:
        """That of a plan's precisions, in its mode of activations and with its KV caches."""
        weights, here = as_served(self._model, on_this_host(plan, self._model.spec, self._window), self._notify)
        with Engine(here, weights.checkpoint, weights.spec, logits=True, notify=self._notify) as engine:
            return measure_divergence(engine.logits, self._reference, self._notify)[1]


def on_this_host(plan: Plan, spec: ModelSpec, max_length: int) -> Plan:
    """Its precisions, mode of activations and KV caches on CPUs, for one sequence.

    In one stage for each run of layers with caches of one width; these compute in turn, so each has all cores.
    """
    holding = (stage for stage in plan.stages if stage.precisions)
    runs = [[*stages] for _, stages in itertools.groupby(holding, key=lambda stage: stage.kv_bits)]
    devices = [Device(f"cpu{i}", "cpu", threads=usable_cores()) for i in range(len(runs))]
    alone = Plan.single(spec, devices[0], W16, slots=1, max_length=max_length, activations=mode_of(plan))
    (whole,) = alone.stages
    stages = [
        replace(
            whole,
            device=device.name,
            layers=(first, end),
            precisions=whole.precisions[first:end],
            kv_bits=run[0].kv_bits,
        )
        for device, run in zip(devices, runs, strict=True)
        for first, end in [(run[0].layers[0], run[-1].layers[1])]
    ]
    here = replace(
        alone,
        cluster=Cluster(tuple(devices)),
        stages=tuple(stages),
        head=replace(alone.head, stage=len(stages) - 1),
    )
    return here.with_precisions([plan.precision(unit) for unit in spec.units])


def mode_of(plan: Plan) -> ActivationMode:
    """How a plan multiplies: as its first CPU stage that quantizes activations, if one does."""
    return next((stage.activations for stage in plan.stages if stage.activations != "a16"), "a16")
