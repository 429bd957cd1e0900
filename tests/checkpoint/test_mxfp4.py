"""gpt_oss with experts in MXFP4, against what transformers makes of the same blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmpq.checkpoint.model_files import load_spec, open_model, resolve
from llmpq.checkpoint.mxfp4 import decoded
from llmpq.checkpoint.weights import dense, open_weights
from llmpq.spec import UsageError
from tests.support.tiny_models import save_model

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """A model whose experts are random blocks; its expert tensors [experts, k, n] as transformers has them."""
    save_model(folder, "gpt_oss", torch.bfloat16, **SIZES)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, k, n = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(117, 129, (experts, n, k // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name.rpartition(".")[2]] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    return plain


def test_blocks_are_read_as_the_numbers_they_stand_for(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    source = open_weights(checkpoint, spec)
    up, down = (dense(source, "layer.0", f"{name}.weight").unflatten(0, (5, -1)) for name in ("up", "down"))
    gate_up = plain["gate_up_proj"].transpose(1, 2)  # rows of gate and up take turns
    assert torch.equal(up, torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), 1))
    assert torch.equal(down, plain["down_proj"].transpose(1, 2))
    assert not spec.stored


def test_the_least_and_the_largest() -> None:
    blocks = torch.tensor([[0x70, *[0] * 14, 0xF1]], dtype=torch.uint8)
    assert decoded(blocks, torch.tensor([[127]], dtype=torch.uint8))[0, [0, 1, 30, 31]].tolist() == [0, 6, 0.5, -6]
    assert decoded(blocks, torch.tensor([[0]], dtype=torch.uint8))[0, 1] == 6 * 2.0**-127


def test_what_is_no_mxfp4_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(path)
    save_file({key: t for key, t in tensors.items() if key != f"{name}_scales"}, path, {"format": "pt"})
    with pytest.raises(UsageError, match=r"down_proj_blocks has no .*down_proj_scales"):
        open_model(str(tmp_path))
    save_file({**tensors, f"{name}_scales": tensors[f"{name}_scales"][:1]}, path, {"format": "pt"})
    with pytest.raises(UsageError, match=r"down_proj_blocks is U8 \[5, 64, 1, 16\] with scales U8 \[1, 64, 1\]"):
        open_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["block_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UsageError, match="'block_size' in its quantization_config of mxfp4 is not supported"):
        open_model(str(tmp_path))
