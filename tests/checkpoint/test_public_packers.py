"""Checkpoints whose linears are packed by the programs that define the forms, as far as these are installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmpq.checkpoint.model_files import Model, open_model
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.quant import QuantTensor
from tests.support.quantized_files import Codes, Tensors, write_quantized_folder

WHY = "it is not installed: pip install '.[formats]'"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
Packer = Callable[[Codes], Tensors]


def dense(made: Codes) -> torch.nn.Linear:
    linear = torch.nn.Linear(made.k, made.n, bias=False)
    linear.weight.data = torch.from_numpy(made.weights).float()
    return linear


def buffers(module: torch.nn.Module) -> Tensors:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def check(folder: Path, packer: Packer, quantization: dict[str, Any], precision: str, **how: Any) -> None:
    """What is read of a folder that `packer` has packed is exactly what it was given."""

    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        made = Codes(n, k, random, **how)
        return packer(made), made.weights

    _, weights = write_quantized_folder(folder, linear, json.loads(json.dumps(quantization)))
    model = open_model(str(folder))
    for part, modules in (("qkv", "qkv"), ("down", ["down"])):
        names = [f"model.layers.0.{'mlp' if part == 'down' else 'self_attn'}.{name}_proj" for name in modules]
        expected = torch.from_numpy(np.concatenate([weights[name] for name in names]))
        rows = rows_of(model, part, precision)
        torch.testing.assert_close(rows, expected, atol=0, rtol=0)


def rows_of(model: Model, part: str, precision: str) -> torch.Tensor:
    rows = list(open_weights(model.checkpoint, model.spec).rows("layer.0", f"{part}.weight"))
    assert {str(portion.precision) if isinstance(portion, QuantTensor) else "" for portion in rows} == {precision}
    return torch.cat([floating(portion) for portion in rows]).double()


@pytest.mark.parametrize(("bits", "version"), [(4, "gptq_v2"), (3, "gptq_v2"), (8, "gptq"), (3, "gptq")])
def test_gptqmodel(bits: int, version: str, tmp_path: Path) -> None:
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason=WHY, exc_type=ImportError)
    quantization = pytest.importorskip("gptqmodel.quantization", reason=WHY, exc_type=ImportError)
    models = pytest.importorskip("gptqmodel.utils.model", reason=WHY, exc_type=ImportError)

    def pack(made: Codes) -> Tensors:
        module = torch_linear.TorchLinear(made.bits, 32, made.symmetric, False, made.k, made.n)
        zeros = torch.from_numpy(made.zeros).float()
        module.pack_original(dense(made), made.scales.float(), zeros, torch.from_numpy(made.groups).int())
        if version == "gptq":
            models.convert_gptq_v2_to_v1_format_module(module, quantization.QuantizeConfig(bits=bits, group_size=32))
        return buffers(module)

    config = {**GPTQ, "bits": bits, "sym": False, "format": version, "checkpoint_format": version}
    check(tmp_path, pack, config, f"w{bits}-g32-asym-stored", bits=bits, symmetric=False, least=int(version == "gptq"))


def test_autoawq(tmp_path: Path) -> None:
    gemm = pytest.importorskip("awq.modules.linear.gemm", reason=WHY, exc_type=ImportError)

    def pack(made: Codes) -> Tensors:
        scales, zeros = made.scales.T.contiguous(), torch.from_numpy(made.zeros.T.copy()).float()
        return buffers(gemm.WQLinear_GEMM.from_linear(dense(made), 4, 32, scales=scales.float(), zeros=zeros))

    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    check(tmp_path, pack, config, "w4-g32-asym-stored", symmetric=False)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq"])
def test_auto_round(packing: str, tmp_path: Path) -> None:
    exporting = pytest.importorskip("auto_round.export.export_to_autoround.export", reason=WHY, exc_type=ImportError)
    symmetric = packing == "auto_round:auto_gptq"

    def pack(made: Codes) -> Tensors:
        kind = exporting.dynamic_import_quant_linear_for_packing(packing, 4, 32, symmetric, 16)
        linear, zeros = dense(made), torch.from_numpy(made.zeros).float()
        if packing == "auto_round:auto_awq":
            return buffers(kind.from_linear(linear, 4, 32, scales=made.scales.T.float(), zeros=zeros.T, device="cpu"))
        module = kind(4, 32, made.k, made.n, bias=False, weight_dtype=torch.float16)
        module.device = torch.device("cpu")
        module.pack(linear, made.scales.float(), zeros, None, device="cpu")
        return buffers(module)

    config = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": symmetric}
    kind = "sym" if symmetric else "asym"
    check(tmp_path, pack, config, f"w4-g32-{kind}-stored", symmetric=symmetric)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, False)])
def test_compressed_tensors(bits: int, symmetric: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason=WHY, exc_type=ImportError)
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base", reason=WHY)
    arguments = library.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=arguments)

    def pack(made: Codes) -> Tensors:
        zeros = torch.from_numpy(made.zeros - 2 ** (bits - 1)).to(torch.int8)
        made.scales = made.scales.abs()
        state = {"weight": dense(made).weight.data, "weight_scale": made.scales, "weight_zero_point": zeros}
        return packing.PackedQuantizationCompressor.compress(state, scheme)

    config = library.QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    kind = "sym" if symmetric else "asym"
    written = json.loads(config.model_dump_json())
    check(tmp_path, pack, written, f"w{bits}-g32-{kind}-stored", bits=bits, symmetric=symmetric)


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_bitsandbytes(form: str, tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason=WHY, exc_type=ImportError)

    def linear(n: int, k: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray[Any, Any]]:
        weight = torch.from_numpy(random.normal(0, k**-0.5, (n, k))).float()
        if form == "int8":
            numbers, scales, _ = library.int8_vectorwise_quant(weight.half())
            tensors = {"weight": numbers, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            return tensors, library.int8_vectorwise_dequant(numbers, scales).double().numpy()
        nested = form == "nf4"
        packed, state = library.quantize_4bit(weight, quant_type=form, compress_statistics=nested)
        parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}, library.dequantize_4bit(packed, state).double().numpy()

    config = {"quant_method": "bitsandbytes", "load_in_8bit": form == "int8", "load_in_4bit": form != "int8"}
    # On a CPU, its own dequantization takes rows to be whole blocks.
    _, weights = write_quantized_folder(tmp_path, linear, config, intermediate_size=128)
    expected = torch.from_numpy(weights["model.layers.0.mlp.down_proj"])
    # Its own float32 is rounded up to three times on the way.
    torch.testing.assert_close(rows_of(open_model(str(tmp_path)), "down", ""), expected, atol=1e-9, rtol=3e-7)
