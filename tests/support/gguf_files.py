"""Tiny GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tests.support.tiny_models import make_model

ALL_TYPES = {  # of parts of a layer: one of each kind of type that can be read
    "q_proj": "Q8_0",
    "k_proj": "Q4_1",
    "v_proj": "Q4_0",
    "up_proj": "Q5_1",
    "down_proj": "F16",
    "o_proj": "BF16",
}


def write_gguf(
    path: Path,
    kind: str = "llama-gqa",
    *,
    types: Mapping[str, str] = ALL_TYPES,
    architecture: str = "llama",
    metadata: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, Sequence[float]] = MappingProxyType({}),
    split: int = 0,
) -> transformers.PreTrainedModel:
    """Write a tiny llama model, each part in its one of `types`, others in F32; return the model it stands for.

    `metadata` replaces values and adds some, and `tensors` adds vectors. With `split`, parts have so many tensors.
    """
    model = make_model(kind, hidden_size=64, intermediate_size=96)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_eos_token_id(1)
    for key, value in metadata.items():
        value_type = gguf.GGUFValueType.get_type
        element = value_type(value[0]) if isinstance(value, list) else None
        writer.kv_data[0][key] = gguf.GGUFValue(value, value_type(value), element)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = name.split(".")[-2]
            kind = gguf.GGMLQuantizationType[types.get(part, "F32") if parameter.dim() == 2 else "F32"]
            data = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)).view(parameter.shape))
            if part in ("q_proj", "k_proj"):
                # Row (half, j) of a head becomes row (j, half).
                data = data.reshape(-1, 2, 8, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
