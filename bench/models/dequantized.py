"""A GGUF file as transformers computes it: its own model class, in float32, with weights that `gguf` dequantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def gguf_in_transformers(path: Path) -> Any:
    """The network. Raises ValueError if it has other tensors than the file; a head that is tied may be missing there.

    (transformers' `from_pretrained` would do the same, but wants accelerate.)
    """
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    network = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=network)["tensors"]
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or not set(missing) <= tied:
        raise ValueError(f"{path.name}: transformers lacks {missing} and does not know {unexpected}")
    network.tie_weights()
    return network
