"""The methods that say what quality each unit loses in each precision, by name; measured once and kept in the cache.

All but the paper's give omega in nats: what quantizing a unit alone makes the model's predictions diverge, or an
estimate of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from llmpq.cache import find_record, keep_record
from llmpq.checkpoint.model_files import Checkpoint, load_tokenizer
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure.fisher_indicator import fisher
from llmpq.measure.hessian_indicator import hessian
from llmpq.measure.kl_indicator import kl
from llmpq.measure.text import calibration_text, digest
from llmpq.measure.variance_indicator import variance
from llmpq.models.quantized_cache import quantizer_version
from llmpq.progress import Notify, silent
from llmpq.spec import ModelSpec, Precision, Sensitivity, SensitivityMethod, UsageError, default_method


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
    key = json.dumps([method, per_linear, spec.content_hash, digest(text), sorted(map(str, quantized)), _version()])
    entry = hashlib.sha256(key.encode()).hexdigest()[:24]
    found = find_record("sensitivity", entry, Sensitivity)
    if found is not None:
        return found
    notify("reading the calibration text")
    token_ids = load_tokenizer(checkpoint).encode(text)
    omega = measure(open_weights(checkpoint, spec), spec, quantized, token_ids, notify)
    result = Sensitivity(spec.name, spec.content_hash, method, digest(text), omega)
    keep_record("sensitivity", entry, result)
    return result


def _version() -> str:
    """Changes with the files that say what a method does, and with the quantizers."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12] + quantizer_version()
