"""Compiles the Triton kernels for GPUs that need not be there, and says what the machine code is made of.

A program of its own, since in the tests' process Triton interprets:
    python triton_compilation.py '[{"kernel": "gemm", "capability": 90, ...}, ...]'
prints one JSON object for each case. Machine code is listed by the nvdisasm that Triton brings along.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmpq.kernels.backends import triton_kernel

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?((?:@!?U?P\w+\s+)?[A-Z][A-Z0-9_.]*\b[^;]*);", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)


def _source(case: dict[str, Any]) -> ASTSource:
    """A kernel as it is launched on contiguous tensors, all of whose sizes are multiples of 16."""
    x, splits = "*" + DTYPES[case["dtype"]], case.get("splits", 1)
    if case["kernel"] == "reduce":
        kernel, arguments = triton_kernel.reduce_kernel, {"parts_ptr": "*fp32"}
        arguments |= {"bias_ptr": x, "residual_ptr": x, "experts_ptr": "*i32", "y_ptr": x}
        arguments |= dict.fromkeys(("m", "n", "residual_stride", "y_stride"), "i32")
        constants = {"OF_EXPERTS": False, "HAS_BIAS": True, "HAS_RESIDUAL": True}
        constants |= {"SPLITS": splits, "BLOCK_N": case["block_n"]}
    else:
        offsets = case.get("offsets", False)
        arguments = {"qweight_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*fp16" if offsets else "*u8"}
        constants = {"K": case["k"], "BITS": case["bits"], "GROUP_SIZE": case["group_size"], "BLOCK_N": case["block_n"]}
        constants["HAS_OFFSETS"] = offsets
        constants["dtype"] = getattr(tl, case["dtype"] if case["tensor_cores"] else "float32")
        if case["kernel"] == "gemm":
            kernel = triton_kernel.gemm_kernel
            arguments = {"x_ptr": x, **arguments, "bias_ptr": x, "residual_ptr": x}
            arguments["y_ptr"] = x if splits == 1 else "*fp32"
            arguments |= dict.fromkeys(("m", "n", "x_stride", "residual_stride", "y_stride", "has_zeros"), "i32")
            constants |= {
                "HAS_BIAS": splits == 1,
                "HAS_RESIDUAL": splits == 1,
                "SPLITS": splits,
                "BLOCK_M": case["block_m"],
            }
        else:
            kernel = triton_kernel.dequantize_kernel
            arguments |= {"out_ptr": x, "rows": "i32", "has_zeros": "i32"}
    aligned = [name for name in arguments if name.endswith(("_ptr", "_stride"))]
    attributes = {(list(arguments).index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constants, attributes)


def instructions(cubin: bytes) -> tuple[list[str], list[str]]:
    """All instructions, and those of the longest loop."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    found = [(match.start(), match[1]) for match in _INSTRUCTION.finditer(listing)]
    places = {match[1]: sum(at < match.start() for at, _ in found) for match in _LABEL.finditer(listing)}
    every, loop = [text for _, text in found], []
    for i, text in enumerate(every):
        target = re.search(r"BRA.*(\.L_x_\d+)", text)
        if target and i - places[target[1]] >= len(loop):
            loop = every[places[target[1]] : i + 1]
    return every, loop


def count(instructions: list[str], names: str) -> int:
    return sum(re.search(rf"\b(?:{names})\b", text) is not None for text in instructions)


def compile_case(case: dict[str, Any]) -> dict[str, float]:
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"], "enable_fp_fusion": True}
    compiled = triton.compile(_source(case), target=GPUTarget("cuda", case["capability"], 32), options=options)
    every, loop = instructions(compiled.asm["cubin"])
    # A warp's HMMA multiplies 16 x 16 weights by 8 rows of x: 8 weights a thread.
    weights = 8 * count(loop, "HMMA") / max(1, case.get("block_m", 8) // 8)
    return {
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(every),
        "hmma": count(every, "HMMA"),
        "wgmma": count(every, "HGMMA|WARPGROUP"),
        "local_memory": count(every, "LDL|STL"),
        "loop": len(loop),
        "loop_stores_to_shared": count(loop, "STS"),
        "loop_per_weight": len(loop) / weights if weights else 0.0,
    }


if __name__ == "__main__":
    print(json.dumps([compile_case(case) for case in json.loads(sys.argv[1])]))
