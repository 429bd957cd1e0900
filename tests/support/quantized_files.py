"""Tiny checkpoints whose linears are quantized, written number by number as the definitions of the forms say."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from tests.support.tiny_models import save_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the number that field i of a word holds
GROUP = 32
_LINEAR = r"\.(layers|h)\.(?!.*gate\.weight$)"  # of layers, but for routers of experts
Tensors = dict[str, torch.Tensor]
Linear = Callable[[int, int, np.random.Generator], tuple[Tensors, np.ndarray[Any, Any]]]


def words(numbers: Iterable[int], bits: int) -> list[int]:
    """A stream of numbers, the first in the lowest bits of the first word."""
    numbers = [*map(int, numbers)]
    stream = sum(number << bits * i for i, number in enumerate(numbers))
    return [stream >> 32 * i & 0xFFFFFFFF for i in range(-(-len(numbers) * bits // 32))]


def packed(rows: Sequence[Iterable[int]], bits: int) -> torch.Tensor:
    """int32 [rows, words]: each row as a stream."""
    return torch.from_numpy(np.array([words(row, bits) for row in rows], np.uint32).view(np.int32))


def awq_packed(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int32 [rows, words], eight numbers to a word in AWQ's order."""
    found = [
        [sum(int(row[at + AWQ_ORDER[i]]) << 4 * i for i in range(8)) for at in range(0, len(row), 8)] for row in rows
    ]
    return torch.from_numpy(np.array(found, np.uint32).view(np.int32))


@dataclass
class Codes:
    """Random codes, zero points and scales, and the weights that they stand for."""

    n: int
    k: int
    random: np.random.Generator
    bits: int = 4
    group: int | None = GROUP  # None: the whole row
    symmetric: bool = True
    least: int = 0  # of zero points
    dtype: torch.dtype = torch.float16  # of scales

    def __post_init__(self) -> None:
        count = 1 if self.group is None else -(-self.k // self.group)
        limit, middle = 2**self.bits, 2 ** (self.bits - 1)
        self.codes = self.random.integers(0, limit, (self.n, self.k))
        self.zeros = np.full((self.n, count), middle)
        if not self.symmetric:
            self.zeros = self.random.integers(self.least, limit, (self.n, count))
        step = 2 * self.k**-0.5 / limit
        scales = self.random.uniform(0.5, 1.5, (self.n, count)) * step * self.random.choice([-1, 1], (self.n, count))
        self.scales = torch.from_numpy(scales).to(self.dtype)
        self.groups = np.arange(self.k) // (self.group or self.k)

    @property
    def weights(self) -> np.ndarray[Any, Any]:
        scales = self.scales.double().numpy()
        return scales[:, self.groups] * (self.codes - self.zeros[:, self.groups])


def gptq(*, less: int = 1, act_order: bool = False, g_idx: bool = True, **how: Any) -> Linear:
    """`less`: 1 in version 1 of the form, 0 in version 2."""

    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        made = Codes(n, k, random, least=less, **how)
        if act_order:
            made.groups = random.permutation(made.groups)
        tensors = {
            "qweight": packed(made.codes, made.bits).T.contiguous(),
            "qzeros": packed(made.zeros.T - less, made.bits),
            "scales": made.scales.T.contiguous(),
        }
        if g_idx:
            tensors["g_idx"] = torch.from_numpy(made.groups.astype(np.int32))
        return tensors, made.weights

    return linear


def awq(**how: Any) -> Linear:
    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        made = Codes(n, k, random, **how)
        return {
            "qweight": awq_packed(made.codes.T),
            "qzeros": awq_packed(made.zeros.T),
            "scales": made.scales.T.contiguous(),
        }, made.weights

    return linear


def pack_quantized(*, act_order: bool = False, packed_zeros: bool = True, **how: Any) -> Linear:
    """`packed_zeros`: as they are since version 0.10 of compressed-tensors."""

    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        made = Codes(n, k, random, **how)
        if act_order:
            made.groups = random.permutation(made.groups)
        tensors = {
            "weight_packed": packed(made.codes, made.bits),
            "weight_scale": made.scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not made.symmetric:
            signed = torch.from_numpy((made.zeros - 2 ** (made.bits - 1)).astype(np.int8))
            in_words = packed(made.zeros.T, made.bits).T.contiguous()
            tensors["weight_zero_point"] = in_words if packed_zeros else signed
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(made.groups.astype(np.int32))
        return tensors, made.weights

    return linear


def scaled(
    numbers: torch.dtype, block: tuple[int, int] | None, scale: str, *, dtype: torch.dtype = torch.float32, one: int = 2
) -> Linear:
    """Small numbers with a scale for each block (None: one for all, in a tensor of `one` axes) called `scale`."""

    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        integer = numbers == torch.int8
        drawn = torch.from_numpy(random.normal(0, 40, (n, k)))
        stored = (drawn.round().clamp(-127, 127) if integer else drawn).to(numbers)
        rows, columns = np.minimum(block or (n, k), (n, k)).tolist()
        scales = torch.from_numpy(random.uniform(0.5, 1.5, (-(-n // rows), -(-k // columns))) / 40 / k**0.5).to(dtype)
        each = scales.double().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        kept = scales if block else scales.reshape([1] * one)
        return {"weight": stored, scale: kept}, (stored.double() * each).numpy()

    return linear


def llm_int8(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
    weight = torch.from_numpy(random.integers(-127, 128, (n, k), np.int8))
    scales = torch.from_numpy(random.uniform(1, 3, n) / k**0.5).float()
    tensors = {"weight": weight, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, (weight.double() * scales.double()[:, None] / 127).numpy()


def four_bits(kind: str, *, block: int = 64, nested: int | None = None, storage: torch.dtype = torch.uint8) -> Linear:
    """NF4 or FP4 with any codebook: it is in the file. `nested`: scales that share a scale of their own."""

    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        codes, count = random.integers(0, 16, n * k), -(-n * k // block)
        codebook = np.sort(random.uniform(-1, 1, 16)).astype(np.float32)
        pairs = [int(codes[i]) << 4 | int(codes[i + 1]) for i in range(0, n * k, 2)]
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [n, k]}
        tensors = {
            "weight": torch.tensor(pairs, dtype=torch.uint8).view(storage)[:, None],
            "weight.quant_map": torch.from_numpy(codebook),
        }
        if nested is None:
            scales = (random.uniform(1, 3, count) / k**0.5).astype(np.float32)
            tensors["weight.absmax"] = torch.from_numpy(scales)
        else:
            inner, of_scales = random.integers(0, 256, count), random.uniform(0, 1, 256).astype(np.float32)
            offset, outer = 2 / k**0.5, (random.uniform(0, 1, -(-count // nested)) / k**0.5).astype(np.float32)
            scales = of_scales[inner].astype(np.float64) * outer[np.arange(count) // nested] + offset
            tensors |= {
                "weight.absmax": torch.from_numpy(inner.astype(np.uint8)),
                "weight.nested_quant_map": torch.from_numpy(of_scales),
                "weight.nested_absmax": torch.from_numpy(outer),
            }
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(text)
        each = scales.astype(np.float64)[np.arange(n * k) // block]
        return tensors, (codebook.astype(np.float64)[codes] * each).reshape(n, k)

    return linear


def unquantized(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
    weight = torch.from_numpy(random.normal(0, k**-0.5, (n, k))).half()
    return {"weight": weight}, weight.double().numpy()


def write_quantized_folder(
    folder: Path,
    linear: Linear,
    quantization: Mapping[str, Any],
    *,
    others: Mapping[str, Linear] | None = None,
    kind: str = "llama-gqa",
    **overrides: Any,
) -> tuple[transformers.PreTrainedModel, dict[str, np.ndarray[Any, Any]]]:
    """Write a tiny model of a kind whose layers' linears are quantized, those that `others` names as it says.

    The model as a network with the dequantized weights, in float32; and these by the name of the module.
    """
    saved = save_model(folder, kind, torch.float16, **{**SIZES, **overrides})
    transposed = {f"{name}.weight" for name, module in saved.named_modules() if isinstance(module, Conv1D)}
    path, random, weights = folder / "model.safetensors", np.random.default_rng(5), {}
    others = others or {}
    tensors = load_file(path)
    linears = [name for name, tensor in tensors.items() if re.search(_LINEAR, name) and tensor.dim() == 2]
    dense = dict(tensors)
    for name in [*linears, *(f"{other}.weight" for other in others if f"{other}.weight" not in linears)]:
        module, shape = name.removesuffix(".weight"), tensors.pop(name).shape
        # Others' packers take a transposed weight for that of a linear.
        made, weights[module] = others.get(module, linear)(*(shape[::-1] if name in transposed else shape), random)
        tensors |= {f"{module}.{kind}": tensor for kind, tensor in made.items()}
        weight = torch.from_numpy(weights[module]).float()
        dense[name] = weight.T.contiguous() if name in transposed else weight
    network = _network(folder, dense)
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(quantization)}))
    return network, weights


def _network(folder: Path, tensors: Tensors) -> transformers.PreTrainedModel:
    """The model of a folder with these tensors in place of its own, in float32."""
    with tempfile.TemporaryDirectory() as dense:
        save_file(tensors, Path(dense, "model.safetensors"), {"format": "pt"})
        shutil.copy(folder / "config.json", dense)
        found: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype="float32")
        return found.eval()
