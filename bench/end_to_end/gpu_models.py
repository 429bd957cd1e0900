"""The shapes of known models with random weights, made on the device that computes with them: for measuring speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmpq.checkpoint.configuration import spec_from_config
from llmpq.checkpoint.weights import Rows
from llmpq.measure.random_layers import random_rows
from llmpq.spec import W16, LinearShape, ModelSpec, Precision

# As transformers' LlamaConfig takes them.
CONFIGS: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1 8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "short": {  # a quarter of it
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 272,
    },
}
THETA = 500000.0
POSITIONS = 4096


def config(name: str) -> dict[str, Any]:
    """The arguments of transformers' LlamaConfig."""
    return CONFIGS[name] | {
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def spec(name: str, precision: Precision) -> ModelSpec:
    """A model whose layers are stored at `precision`; embedding and head have 16 bits."""
    known = {"model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu", **config(name)}
    found = spec_from_config(known, f"Llama {name}, random weights", "random")
    if precision.quantized:
        linears = dict.fromkeys(found.linears("layer.0"), precision)
        found.stored.update({f"layer.{i}": linears for i in range(found.num_layers)})
    return found


class RandomWeights:
    """A WeightSource whose rows are made up where they are wanted. What is made up again differs."""

    cacheable = False

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device

    def rows(self, unit: str, part: str, start: int = 0, stop: int | None = None) -> Iterator[Rows]:
        """All of a part at once, quantized if the model stores it so."""
        name, _, kind = part.partition(".")
        linears = self._spec.linears(unit)
        if kind == "weight" and name in linears:
            shape, precision = linears[name], self._spec.stored.get(unit, {}).get(name, W16)
            stop = shape.n if stop is None else stop
            with self._device:
                rows = random_rows(LinearShape(stop - start, shape.k), precision, torch.bfloat16)
            yield rows
        else:
            yield torch.ones(self._spec.hidden_size)  # of a norm: there are no biases
