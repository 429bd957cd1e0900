"""Tensors in MXFP4 (OCP Microscaling Formats, version 1.0) in safetensors files, which are read as floating-point ones.

32 numbers along k have the factor 2^(scale - 127) in common and are 4-bit floats with two bits of exponent and one of
mantissa each. A tensor NAME of [experts, n, k] is stored as NAME_blocks, uint8 [experts, n, k / 32, 16], in whose bytes
the lower half comes first, and NAME_scales, uint8 [experts, n, k / 32].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmpq.checkpoint.tensor_index import Index
from llmpq.spec import UsageError

if TYPE_CHECKING:
    import torch

METHOD = "mxfp4"
_BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def is_mxfp4(quantization: Any, name: str) -> bool:
    """Whether a quantization_config says that. UsageError if it says more than which tensors are so shows."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return False
    if unknown := set(quantization) - {"quant_method", "modules_to_not_convert"}:
        raise UsageError(f"{name}: {min(unknown)!r} in its quantization_config of {METHOD} is not supported")
    return True


def joined(index: Index) -> Index:
    """Blocks and scales as one tensor each, of the type MXFP4_PAIR. UsageError unless they fit each other."""
    found = dict(index)
    for name in [name for name in index if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = index[name], index.get(f"{stem}_scales")
        if scales is None:
            raise UsageError(f"{blocks.path}: {blocks.name} has no {stem}_scales beside it")
        *rows, count, half = blocks.shape
        if (blocks.type, scales.type, half, scales.shape) != ("U8", "U8", _BLOCK // 2, (*rows, count)):
            raise UsageError(
                f"{blocks.path}: {blocks.name} is {blocks.type} {list(blocks.shape)} with scales {scales.type} "
                f"{list(scales.shape)}, which is no MXFP4"
            )
        del found[name], found[f"{stem}_scales"]
        found[stem] = replace(blocks, shape=(*rows, count * _BLOCK), type="MXFP4_PAIR", scales=scales)
    return found


def decoded(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [rows, k] of blocks uint8 [rows, k / 2] and scales uint8 [rows, k / 32]."""
    import torch

    codes = torch.stack((blocks & 15, blocks >> 4), -1).view(len(blocks), -1, _BLOCK)
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)))[codes.long()]
    return torch.ldexp(values, scales[..., None].int() - 127).flatten(1)
