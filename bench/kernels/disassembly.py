"""What can be said of the CUDA kernels' speed without a GPU: their machine code, kernel by kernel.

    python -m bench.kernels.disassembly [EXTENSION OR CUBIN ...] [--arch sm_90a]

Prints, for each tensor-core kernel, its registers, the instructions before its first copy, and those of its main loop
for each weight, beside what a GPU can issue while it reads one. Exits with 1 if a rule is broken: no local memory, no
calls, tensor cores and asynchronous copies in use, and for few rows of x few instructions before the first of those,
few registers and a main loop within the budget of an H100 or, in the kernels for fewest rows of bfloat16 on Hopper,
within what was reached once.

The budget is that of a warp scheduler: 4 instructions of 32 threads a clock and SM, at 1.98 GHz, against 3.0 TB/s over
132 SMs. A loop's count is of all its instructions; some are for one warp of four only.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

BYTES_A_CLOCK = 3.0e12 / 132 / 1.98e9  # that an SM of an H100 reads
ISSUED_A_CLOCK = 128  # instructions of one thread
LOOP_WEIGHTS = 128  # of each thread in one turn of the main loop: 2 panels of 16 rows and 128 columns, over 32 lanes
LEAST_SMALL_STEPS = 2  # kernels for up to 16 rows of x, which are to be limited by memory
MOST_REGISTERS = 96  # of kernels for up to 8 rows: a block of the next kernel fits an SM beside four
MOST_A_WEIGHT = {3: 2.15, 4: 2.0, 8: 2.9}  # instructions of biased_kernel for up to 8 rows, by bits: what was reached
MOST_BEFORE_COPIES = 80  # instructions that a block may spend before it asks for its first bytes


def disassembler() -> str | None:
    """cuobjdump: of the CUDA toolkit on PATH, else the one that triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.submodule_search_locations:
        return None
    path = Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.is_file() else None


def budget(bits: int) -> float:
    """Instructions that an H100 can issue while it reads a weight, groups of 128 with their scales included."""
    return (bits + 16 / 128) / 8 / BYTES_A_CLOCK * ISSUED_A_CLOCK


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    target: int | None  # of a branch


@dataclass(frozen=True)
class Kernel:
    """The code of one kernel for one architecture."""

    name: str
    instructions: tuple[Instruction, ...]
    registers: int = 0  # of a thread; 0: not said

    def count(self, *prefixes: str) -> int:
        """Instructions whose names begin with one of these."""
        return sum(instruction.name.startswith(prefixes) for instruction in self.instructions)

    def before(self, prefix: str) -> int:
        """Instructions before the first one whose name begins with this; all if there is none."""
        names = [instruction.name.startswith(prefix) for instruction in self.instructions]
        return names.index(True) if any(names) else len(names)

    def main_loop(self) -> tuple[Instruction, ...]:
        """The shortest loop with tensor-core instructions; empty if there is none."""
        loops = [
            [i for i in self.instructions if branch.target <= i.address <= branch.address]
            for branch in self.instructions
            if branch.target is not None and branch.target < branch.address
        ]
        products = [tuple(loop) for loop in loops if any(i.name.startswith(("HMMA", "HGMMA")) for i in loop)]
        return min(products, key=len, default=())


def kernels(files: Iterable[Path], arch: str) -> Iterator[Kernel]:
    """All kernels for `arch` in extensions or cubins."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("cuobjdump is not on PATH, and triton is not installed")
    for file in files:
        select = [] if file.suffix == ".cubin" else ["-arch", arch]
        command = [tool, "-sass", "-res-usage", *select, str(file)]
        yield from parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(listing: str) -> Iterator[Kernel]:
    """The kernels of a listing of cuobjdump -sass, with their registers where -res-usage is listed before it."""
    registers = dict(re.findall(r"\n\s*Function (\S+):\s+REG:(\d+)", listing))
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
    for part in re.split(r"\n\s*Function : ", listing)[1:]:
        name, _, body = part.partition("\n")
        instructions = []
        for address, mnemonic, operands in line.findall(body):
            target = re.search(r"0x([0-9a-f]+)", operands) if mnemonic.startswith("BRA") else None
            instructions.append(Instruction(int(address, 16), mnemonic, int(target[1], 16) if target else None))
        yield Kernel(name.strip(), tuple(instructions), int(registers.get(name.strip(), 0)))


@dataclass(frozen=True)
class TileKernel:
    """One instantiation of tile_kernel or biased_kernel in csrc/cuda/mma.cuh, or of wide_kernel in wgmma.cuh."""

    code: Kernel
    name: str  # tile, biased or wide
    bits: int
    dtype: str
    steps: int
    flush_blocks: int
    offsets: bool

    @classmethod
    def of(cls, code: Kernel) -> TileKernel | None:
        found = re.search(r"(tile|wide)_kernelILi(\d)E\d+(__half|__nv_bfloat16)Li(\d+)ELi(\d)ELb(\d)E", code.name)
        biased = re.search(r"(biased)_kernelILi(\d)ELi(\d)ELb(\d)E", code.name)
        if found:
            name, bits, dtype, size, flush_blocks, offsets = found.groups()
        elif biased:
            (name, bits, size, offsets), dtype, flush_blocks = biased.groups(), "nv_bfloat16", "4"
        else:
            return None
        if name != "tile" and not code.count("HMMA", "HGMMA"):
            return None  # for other architectures it is empty, and nobody calls it
        steps = int(size) // 8 if name == "wide" else int(size)
        return cls(code, name, int(bits), dtype.strip("_"), steps, int(flush_blocks), offsets == "1")

    def order(self) -> tuple[int | str, ...]:
        """In which they are printed."""
        return self.bits, self.dtype, self.offsets, self.flush_blocks, self.name == "wide", self.steps, self.name

    @property
    def per_weight(self) -> float:
        """Instructions of the main loop for each weight."""
        return len(self.code.main_loop()) / LOOP_WEIGHTS

    def faults(self) -> list[str]:
        """The rules it breaks. The budget is not for groups under 128: their sums take more."""
        found = []
        if self.code.count("LDL", "STL"):
            found.append("uses local memory")
        if self.code.count("RET"):
            found.append("calls functions")  # divisions of 64 bits, say
        if self.code.count("MEMBAR.SC"):
            found.append("orders all memory where blocks meet")  # one release and acquire is enough
        if not self.code.main_loop():
            found.append("has no loop with tensor-core instructions")
        if not self.code.count("LDGSTS"):
            found.append("has no asynchronous copies")
        loop = Counter(i.name.partition(".")[0] if "HGMMA" in i.name else i.name for i in self.code.main_loop())
        if self.name == "wide" and 2 * loop["WARPGROUP.ARRIVE"] > loop["HGMMA"]:
            found.append("makes one product of warpgroups after the other")  # of which ptxas warns: C7510 and others
        few_rows = self.steps <= LEAST_SMALL_STEPS
        before = self.code.before("LDGSTS")
        if few_rows and MOST_BEFORE_COPIES < before < len(self.code.instructions):
            found.append(f"takes {before} instructions before its first copy, beyond {MOST_BEFORE_COPIES}")
        if self.steps == 1 and self.code.registers > MOST_REGISTERS:
            found.append(f"takes {self.code.registers} registers, beyond {MOST_REGISTERS}")
        most = MOST_A_WEIGHT[self.bits] if self.name == "biased" and self.steps == 1 else budget(self.bits)
        if few_rows and self.flush_blocks > 1 and self.per_weight > most:
            found.append(f"takes {self.per_weight:.2f} instructions a weight, beyond {most:.2f}")
        return found

    def __str__(self) -> str:
        mix = Counter(i.name.split(".")[0] for i in self.code.main_loop()).most_common(6)
        groups = "< 128" if self.flush_blocks == 1 else ">= 128"
        return (
            f"{self.name:6} w{self.bits} {self.dtype:11} m <= {8 * self.steps:3} groups {groups:6} "
            f"{'offsets' if self.offsets else '':7} {self.code.registers:3} registers, "
            f"{self.code.before('LDGSTS'):3} before the first copy, "
            f"{self.per_weight:5.2f} of {budget(self.bits):5.2f} a weight: "
            + ", ".join(f"{count} {name}" for name, count in mix)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: the installed extension llmpq._cuda")
    parser.add_argument("--arch", default="sm_90a", help="architecture to look at in an extension")
    arguments = parser.parse_args()
    if not arguments.files:
        extension = importlib.util.find_spec("llmpq._cuda")
        if extension is None or extension.origin is None:
            print("error: llmpq was built without CUDA; name a cubin or an extension", file=sys.stderr)
            return 2
        arguments.files = [Path(extension.origin)]
    codes = list(kernels(arguments.files, arguments.arch))
    tiles = sorted(filter(None, map(TileKernel.of, codes)), key=TileKernel.order)
    faults = [
        f"{code.name}: uses local memory" for code in codes if not TileKernel.of(code) and code.count("LDL", "STL")
    ]
    for tile in tiles:
        print(tile)
        faults += [f"{tile.code.name}: {fault}" for fault in tile.faults()]
    if not tiles:
        faults.append(f"there is no tensor-core kernel for {arguments.arch}")
    for fault in faults:
        print("broken:", fault)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
