"""What a KV cache of 8 bits in all layers changes in the predictions, measured as `kl_indicator` measures a unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.kl_indicator import ROWS, SEQUENCE_LENGTH, SEQUENCES, damages
from llmpq.progress import Notify, counted, silent
from llmpq.spec import ModelSpec


@torch.inference_mode()
def int8_cache_kl(source: WeightSource, spec: ModelSpec, token_ids: Sequence[int], notify: Notify = silent) -> float:
    """E_t[ KL(p_t || q_t) ] in nats: p_t is what the model predicts after token t, q_t what it does with such a cache.

    Both go through the layers side by side, in float32 but for the keys and values.
    """
    exact, rounded = (
        CalibrationPass(spec, source, token_ids, SEQUENCES, SEQUENCE_LENGTH, cache_dtype=dtype)
        for dtype in (torch.float32, torch.int8)
    )
    done = counted(notify, "measuring what a KV cache of 8 bits changes", spec.num_layers + -(-exact.tokens // ROWS))
    as_is = changed = exact.embed()
    for i in range(spec.num_layers):
        layer = exact.layer(i)
        as_is, changed = exact.run(layer, as_is), rounded.run(layer, changed)
        done()
    head = exact.head()
    return damages(exact, head, as_is, {"kv_cache": (head, changed)}, done)["kv_cache"].kl
