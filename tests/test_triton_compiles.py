"""The Triton kernel compiles for GPUs where there is none: in another process, since in this one it is interpreted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmpq.kernels.triton_gemm import config
from llmpq.kernels.triton_kernel import gemm_kernel
from llmpq.spec import Precision

K = 4096
results = []
for name, dtype, capability in json.loads(sys.argv[1]):
    precision = Precision.parse(name)
    tile = config(precision)
    constants = dict(K=K, BITS=precision.bits, GROUP_SIZE=precision.group_size or K, SYMMETRIC=precision.symmetric,
                     HAS_BIAS=True, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    signature = dict(x_ptr="*" + dtype, qweight_ptr="*i32", scales_ptr="*fp16", zeros_ptr="*u8", bias_ptr="*" + dtype,
                     y_ptr="*" + dtype, m="i32", n="i32", x_stride="i32", y_stride="i32")
    source = ASTSource(gemm_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    results.append([len(compiled.asm["cubin"]), "mma" in compiled.asm["ptx"], compiled.metadata.shared])
print(json.dumps(results))
"""
CASES = [
    (precision, dtype, capability)
    for capability in (80, 90)
    for precision, dtype in (
        ("w3-g128-sym-rtn-a16", "fp16"),
        ("w3-g32-asym-rtn-a16", "bf16"),
        ("w4-g128-asym-rtn-a16", "bf16"),
        ("w4-grow-sym-rtn-a16", "fp16"),
        ("w8-g64-asym-rtn-a16", "fp16"),
        ("w8-g128-sym-rtn-a16", "bf16"),
        ("w4-g64-sym-rtn-a16", "fp32"),
    )
]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one program may use


def test_kernel_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for case, (cubin_bytes, tensor_cores, shared) in zip(CASES, json.loads(result.stdout), strict=True):
        assert cubin_bytes > 0, case
        assert tensor_cores == (case[1] != "fp32"), case
        assert shared <= SHARED_BYTES[case[2]], case
