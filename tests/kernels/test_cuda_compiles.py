"""The CUDA kernels' machine code: every instantiation is there, and none has what would make it slow for certain."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.kernels.disassembly import TileKernel, budget, disassembler, kernels, parse

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [CSRC / f"cuda/gemm_w{bits}.cu" for bits in (3, 4, 8)]


@pytest.fixture(scope="module")
def extension() -> Path | None:
    """The extension, if it was built for all the architectures that it is built for by default."""
    found = importlib.util.find_spec("llmpq._cuda")
    return None if found is None or found.origin is None or "CUDAARCHS" in os.environ else Path(found.origin)


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def architecture(request: pytest.FixtureRequest) -> str:
    """Of the code that is looked at."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def tiles(architecture: str, extension: Path | None, tmp_path_factory: pytest.TempPathFactory) -> list[TileKernel]:
    """The tensor-core kernels of the extension or, where there is none, compiled here."""
    if disassembler() is None:
        pytest.skip("cuobjdump is not on PATH, and triton is not installed")
    files = [extension] if extension else []
    if not files:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            pytest.skip("nvcc is not on PATH")
        for source in SOURCES:
            files.append(tmp_path_factory.mktemp("cubins") / f"{source.stem}.cubin")
            command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch={architecture}", "-cubin", source]
            command += ["-DLLMPQ_WGMMA"] if architecture == "sm_90a" else []
            subprocess.run([*command, "-o", files[-1]], check=True)
    codes = list(kernels(files, architecture))
    assert not [code.name for code in codes if code.count("LDL", "STL")], "kernels that use local memory"
    return [tile for tile in map(TileKernel.of, codes) if tile is not None]


def test_every_tensor_core_kernel_is_compiled(tiles: list[TileKernel], architecture: str) -> None:
    found = {(tile.name, tile.bits, tile.dtype, tile.flush_blocks, tile.steps, tile.offsets) for tile in tiles}
    sizes = [("tile", 4, 8, False), *itertools.product(("tile",), (1, 4), (1, 2, 4), (False, True))]
    few: list[tuple[str, int, int, bool]] = []
    if architecture == "sm_90a":
        sizes += [("wide", 4, 16, False), *itertools.product(("wide",), (1, 4), (4, 8), (False, True))]
        few += itertools.product(("biased",), (4,), (1, 2), (False, True))
    weights = [
        *itertools.product((3, 4, 8), ("half", "nv_bfloat16"), sizes),
        *itertools.product((3, 4, 8), ("nv_bfloat16",), few),
    ]
    assert found == {(name, bits, dtype, *size) for bits, dtype, (name, *size) in weights}


def test_tensor_core_kernels_copy_soon_and_ahead_within_the_instruction_budget(
    tiles: list[TileKernel],
) -> None:
    faults = {tile.code.name: tile.faults() for tile in tiles}
    assert not {name: found for name, found in faults.items() if found}


def test_extension_holds_code_for_turing_to_hopper(extension: Path | None) -> None:
    if extension is None:
        pytest.skip("llmpq was built without CUDA, or CUDAARCHS chose other architectures")
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump is not on PATH, and triton is not installed")
    listing = subprocess.run([tool, "--list-elf", extension], check=True, capture_output=True, text=True).stdout
    for architecture in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a"):
        assert listing.count(f".{architecture}.") >= 3, f"expected {architecture} code for 3, 4 and 8 bits: {listing}"


LISTING = """
 Function _ZN5llmpq11tile_kernelILi4E6__halfLi1ELi4ELb0EEEvNS_12CudaGemmArgsE:
  REG:96 STACK:0 SHARED:1 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90
		Function : _ZN5llmpq11tile_kernelILi4E6__halfLi1ELi4ELb0EEEvNS_12CudaGemmArgsE
        /*0000*/                   MOV R1, c[0x0][0x28] ;                    /* 0x0 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ; /* 0x0 */
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;          /* 0x0 */
        /*0030*/              @!P0 BRA 0x10 ;                                /* 0x0 */
        /*0040*/               @P1 STL [R1], R4 ;                            /* 0x0 */
        /*0050*/                   BRA 0x0 ;                                 /* 0x0 */
"""


def test_listing_is_read_instruction_by_instruction_and_faults_are_named() -> None:
    (kernel,) = parse(LISTING)
    tile = TileKernel.of(kernel)
    assert tile is not None
    assert (tile.bits, tile.dtype, tile.steps, tile.flush_blocks) == (4, "half", 1, 4)
    assert not tile.offsets
    assert [instruction.address for instruction in kernel.main_loop()] == [0x10, 0x20, 0x30]
    assert (kernel.count("LDL", "STL"), kernel.count("HMMA"), kernel.registers) == (1, 1, 96)
    assert (kernel.before("LDGSTS"), kernel.before("RED")) == (1, 6)
    assert tile.faults() == ["uses local memory"]


def test_a_late_first_copy_and_a_call_are_faults() -> None:
    late = "        /*0000*/                   RET.REL.NODEC R2 0x0 ;                   /* 0x0 */\n" * 80
    (kernel,) = parse(LISTING.replace("        /*0010*/", late + "        /*0010*/", 1))
    tile = TileKernel.of(kernel)
    assert tile is not None
    expected = ["uses local memory", "calls functions", "takes 81 instructions before its first copy, beyond 80"]
    assert tile.faults() == expected


def test_registers_and_a_long_loop_are_faults_of_kernels_for_few_rows() -> None:
    listing = LISTING.replace("tile_kernelILi4E6__halfLi1ELi4ELb0E", "biased_kernelILi4ELi1ELb0E")
    biased = listing.replace("REG:96", "REG:97")
    product = next(line for line in biased.splitlines(keepends=True) if "HMMA" in line)
    (kernel,) = parse(biased.replace(product, product * 255))
    tile = TileKernel.of(kernel)
    assert tile is not None
    assert (tile.name, tile.dtype, tile.flush_blocks) == ("biased", "nv_bfloat16", 4)
    assert tile.faults() == [
        "uses local memory",
        "takes 97 registers, beyond 96",
        "takes 2.01 instructions a weight, beyond 2.00",
    ]


@pytest.mark.parametrize(("bits", "expected"), [(4, 5.75), (3, 4.36), (8, 11.3)])
def test_the_budget_is_the_number_of_instructions_an_h100_issues_while_it_reads_a_weight(
    bits: int, expected: float
) -> None:
    assert budget(bits) == pytest.approx(expected, abs=0.05)
