"""Tiny GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
    path: Path, tied: bool = False, *, types: Mapping[str, str] = ALL_TYPES, **metadata: Any
) -> transformers.PreTrainedModel:
    """Write a tiny llama model, each part in its one of `types`, others in F32; return the model it stands for."""
    model = make_model("llama-tied" if tied else "llama-gqa", hidden_size=64, intermediate_size=96)
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(metadata.get("rotated", 16))
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = name.split(".")[-2]
            kind = gguf.GGMLQuantizationType[types.get(part, "F32")]
            data = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)).view(parameter.shape))
            if part in ("q_proj", "k_proj"):
                # Row (half, j) of a head becomes row (j, half).
                data = data.reshape(-1, 2, 8, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
            writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    if metadata.get("rope_freqs"):
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
