"""Marlin, Machete and gptq_gemm, out of the library in a vLLM wheel; vLLM itself is not needed.

The environment variable LLMPQ_VLLM_LIBRARY names the file, `vllm/_C_stable_libtorch.abi3.so` in a wheel that was built
for the torch at hand (vllm 0.25.0 for torch 2.11.0 with CUDA 13). Operators and layouts are those of that version.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from bench.kernels.rivals import VLLM_LIBRARY, Contender, Problem, in_turn
from bench.kernels.rivals.gptq_format import bit_stream, marlin_scales, scalar_type


def _load() -> Any:
    path = os.environ.get(VLLM_LIBRARY)
    if not path:
        raise ImportError(f"{VLLM_LIBRARY} names no library")
    if not os.path.isfile(path):
        raise ImportError(f"{VLLM_LIBRARY} names {path}, which is no file")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(str(error)) from None
    return torch.ops._C


_ops = _load()
_THREAD_BLOCKS_PER_SM = 1  # that Marlin's locks are counted for


def contender(problem: Problem, kind: str, bits: int) -> Contender:
    return {"marlin": _marlin, "machete": _machete, "gptq": _gptq}[kind](problem, bits)


def _columns(problem: Problem, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [k * bits / 32, n] and scales [groups, n]: weights as vLLM reads them from a GPTQ checkpoint."""
    codes, scales = problem.codes(bits)
    return bit_stream(codes, bits).T.contiguous(), scales.to(problem.dtype).T.contiguous()


def _marlin(problem: Problem, bits: int) -> Contender:
    n, k = problem.shape
    qweight, scales = _columns(problem, bits)
    nothing = torch.empty(0, dtype=torch.int32, device=qweight.device)
    packed = _ops.gptq_marlin_repack(qweight, nothing, k, n, bits, False)
    scales = marlin_scales(scales)
    blocks = torch.cuda.get_device_properties(qweight.device).multi_processor_count * _THREAD_BLOCKS_PER_SM
    locks = torch.zeros(blocks, dtype=torch.int32, device=qweight.device)
    weights = problem.rotated(packed, scales)

    def linear(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
        y: torch.Tensor = _ops.marlin_gemm(
            x,
            None,  # out
            w[0],
            None,  # bias
            w[1],
            None,  # scales of x
            None,  # global scale
            nothing,  # zeros
            nothing,  # group indices
            nothing,  # permutation
            locks,
            scalar_type(bits),
            len(x),
            n,
            k,
            True,  # all of k is here
            False,  # atomic additions
            True,  # sums of thread blocks in float32, as vLLM has it
            False,  # zeros are floating point
        )
        return y

    linears = [lambda x, w=w: linear(x, w) for w in weights]
    nbytes = packed.nbytes + scales.nbytes
    return Contender(nbytes, len(weights), problem.quantized(bits).dequantize, in_turn(linears))


def _machete(problem: Problem, bits: int) -> Contender:
    qweight, scales = _columns(problem, bits)
    columns = qweight.T.contiguous().T  # it wants k to be the fast direction
    packed = _ops.machete_prepack_B(columns, problem.dtype, scalar_type(bits), problem.dtype)
    weights = problem.rotated(packed, scales)

    def linear(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # Behind the weight's type: the type of y, scales, zeros, group size, scales of columns and rows, a schedule.
        y: torch.Tensor = _ops.machete_mm(
            x, w[0], scalar_type(bits), None, w[1], None, problem.group_size, None, None, None
        )
        return y

    linears = [lambda x, w=w: linear(x, w) for w in weights]
    nbytes = packed.nbytes + scales.nbytes
    return Contender(nbytes, len(weights), problem.quantized(bits).dequantize, in_turn(linears))


def _gptq(problem: Problem, bits: int) -> Contender:
    """The exllama kernels. In a checkpoint of GPTQ's first format a zero is stored less 1."""
    if problem.dtype != torch.float16:
        raise ValueError(f"takes float16 alone, not {problem.dtype}")
    n, _ = problem.shape
    qweight, scales = _columns(problem, bits)
    nothing = torch.empty(0, dtype=torch.int32, device=qweight.device)
    _ops.gptq_shuffle(qweight, nothing, bits)
    zeros = torch.full((len(scales), n), 2 ** (bits - 1) - 1, dtype=torch.uint8, device=qweight.device)
    weights = problem.rotated(qweight, bit_stream(zeros, bits), scales)
    linears = [lambda x, w=w: _ops.gptq_gemm(x, w[0], w[1], w[2], nothing, True, False, bits) for w in weights]
    nbytes = sum(tensor.nbytes for tensor in weights[0])
    return Contender(nbytes, len(weights), problem.quantized(bits).dequantize, in_turn(linears))
