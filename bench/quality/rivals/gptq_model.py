"""GPTQModel on the CPU, with integer zeros and else its own settings: GPTQ, or GPTAQ, which corrects targets."""

from __future__ import annotations

import os
import tempfile

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails on a machine for which it chooses 1

from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FORMAT, GPTAQConfig

from bench.quality.rivals import Quantized, Task, grouped_bits


def quantize(task: Task, corrected: bool = False) -> Quantized:
    with tempfile.TemporaryDirectory() as offloaded:
        config = QuantizeConfig(
            bits=task.bits,
            group_size=task.group_size,
            sym=False,
            format=FORMAT.GPTQ_V2,  # zeros as they are, not less one
            device="cpu",
            gptaq=GPTAQConfig(device="cpu") if corrected else None,
            offload_to_disk_path=offloaded,
            offload_to_disk=False,
        )
        model = GPTQModel.load(str(task.bed.folder), config, dtype=torch.float32)
        calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in task.token_ids]
        model.quantize(calibration, batch_size=4)
        weights = {
            name: model.model.get_submodule(name).dequantize_weight().T.float().contiguous()
            for name in task.bed.linears
        }
    return Quantized(weights, grouped_bits(weights, task.bits, task.group_size, task.bits))
