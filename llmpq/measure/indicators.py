"""The methods that say what quality each unit loses in each precision, by name; measured once and kept in the cache.

All but the paper's give omega in nats: what quantizing a unit alone makes the model's predictions diverge, or an
estimate of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from llmpq.cache import find_record, keep_record
from llmpq.checkpoint.model_files import Checkpoint, load_tokenizer
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure.cache_divergence import int8_cache_kl
from llmpq.measure.fisher_indicator import fisher
from llmpq.measure.hessian_indicator import hessian
from llmpq.measure.kl_indicator import kl
from llmpq.measure.text import calibration_text, digest
from llmpq.measure.variance_indicator import variance
from llmpq.models.quantized_cache import quantizer_version
from llmpq.progress import Notify, silent
from llmpq.spec import ModelSpec, Precision, Sensitivity, SensitivityMethod, UsageError, default_method
from llmpq.spec.sensitivity import KV_CACHE


class Method(Protocol):
    def __call__(
        self,
        source: WeightSource,
        spec: ModelSpec,
        precisions: Sequence[Precision],
        token_ids: Sequence[int],
        notify: Notify = silent,
        /,
    ) -> dict[str, dict[str, float]]:
        """omega[unit][precision] of all of a model's units and all quantized `precisions`, on a text of `token_ids`.

        Holds a unit at a time. Raises UsageError for a text of less than two tokens.
        """


def random_indicator(
    source: WeightSource,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    token_ids: Sequence[int],
    notify: Notify = silent,
) -> dict[str, dict[str, float]]:
    """Log-uniform over the three decades that measured ones spread over; what any method has to be better than.

    The same for one model shape on every machine. A unit's noise falls with its steps, as in `variance`.
    """
    generator = random.Random(0)
    drawn = {unit: math.exp(generator.uniform(math.log(1e-3), 0.0)) for unit in spec.units}
    return {unit: {str(p): omega * (7 / (2**p.bits - 1)) ** 2 for p in precisions} for unit, omega in drawn.items()}


_NOT_IN_NATS = ("random", "variance", "variance-deterministic")
METHODS: Mapping[SensitivityMethod, Method] = {
    "random": random_indicator,
    "variance": variance,
    "variance-deterministic": partial(variance, deterministic=True),
    "variance-relative": partial(variance, relative=True),
    "hessian": hessian,
    "fisher": fisher,
    "kl": kl,
}


def sensitivity(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    precisions: Sequence[Precision],
    method: SensitivityMethod | None = None,
    text: str | None = None,
    per_linear: bool = False,
    notify: Notify = silent,
) -> Sensitivity:
    """omega of every unit at each of `precisions` by one of METHODS, from the cache if it was measured before.

    No method is that of `default_method`. `text` is what the model reads meanwhile, calibration_text() by default. With
    `per_linear` also of each linear of each layer, which only "fisher" tells. Raises UsageError for a text of less than
    two tokens, or another method.
    """
    quantized = list(dict.fromkeys(p for p in precisions if p.quantized))
    method = method or default_method(quantized, per_linear=per_linear)
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r} for sensitivities; choose one of {', '.join(METHODS)}")
    measure = METHODS[method]
    if per_linear:
        if method != "fisher":
            raise UsageError(f"the method {method} does not tell what each linear loses; choose fisher")
        measure = partial(fisher, per_linear=True)
    text = calibration_text() if text is None else text

    def omega(token_ids: Sequence[int]) -> dict[str, dict[str, float]]:
        return measure(open_weights(checkpoint, spec), spec, quantized, token_ids, notify)

    return _kept(checkpoint, spec, method, text, [per_linear, sorted(map(str, quantized))], omega, notify)


def with_cache(
    found: Sensitivity, checkpoint: Checkpoint, spec: ModelSpec, text: str | None = None, notify: Notify = silent
) -> Sensitivity:
    """Sensitivities with that of a KV cache of 8 bits, measured, or from the cache, unless they have it.

    Raises UsageError for those of the paper's method, which are in another unit.
    """
    if KV_CACHE in found.omega:
        return found
    if found.method in _NOT_IN_NATS:
        raise UsageError(
            f"what a KV cache of 8 bits loses is measured in nats, and sensitivities by {found.method} are not; choose "
            "another --method, or --kv-bits 16"
        )

    def omega(token_ids: Sequence[int]) -> dict[str, dict[str, float]]:
        return {KV_CACHE: {"8": int8_cache_kl(open_weights(checkpoint, spec), spec, token_ids, notify)}}

    of_cache = _kept(checkpoint, spec, "kl", calibration_text() if text is None else text, [KV_CACHE], omega, notify)
    return replace(found, omega=found.omega | of_cache.omega)


def _kept(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    method: SensitivityMethod,
    text: str,
    key: Sequence[object],
    omega: Callable[[Sequence[int]], dict[str, dict[str, float]]],
    notify: Notify,
) -> Sensitivity:
    """What `omega` makes of a text's tokens, from the cache if it was measured before; `key` says what is measured."""
    everything = json.dumps([method, spec.content_hash, digest(text), *key, _version()])
    entry = hashlib.sha256(everything.encode()).hexdigest()[:24]
    found = find_record("sensitivity", entry, Sensitivity)
    if found is not None:
        return found
    notify("reading the calibration text")
    result = Sensitivity(
        spec.name, spec.content_hash, method, digest(text), omega(load_tokenizer(checkpoint).encode(text))
    )
    keep_record("sensitivity", entry, result)
    return result


def _version() -> str:
    """Changes with the files that say what a method does, and with the quantizers."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12] + quantizer_version()
