"""The CPU's kernels: whether they are built and right, and which instruction set they use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import get_args

from llmpq.doctor.finding import Finding, ok, problem, warning
from llmpq.doctor.probing import Answer
from llmpq.host_limits import Read, read_file
from llmpq.spec.cluster import Isa

_TOPIC = "processor"
_REBUILD = "run `pip install .` in llmpq's source, with a C++17 compiler on the PATH"
_FLAGS = {  # instruction set -> what Linux calls the parts of it that the kernels need; see csrc/cpu/dispatch.cpp
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "amx": {"avx512f", "amx_tile", "amx_int8"},
}
_WRONG = 1e-5  # relative error of a product in float32, which has 1e-7


def wants_amx(read: Read = read_file) -> bool:
    """Whether the processor has AMX for int8, as the system says."""
    return "amx_int8" in _flags(read)


def processor_findings(
    extension: Answer,
    amx: Answer | None,
    kernels: Answer,
    read: Read = read_file,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Finding]:
    """`extension`: of importing llmpq._cpu; `amx`: the same with LLMPQ_ISA=amx, None where there is no AMX."""
    yield ok(_TOPIC, "name", _name(read))
    if extension.problem:
        yield _missing(extension.problem)
    else:
        yield _isa(extension.values["isa"], read, environment)
        yield _amx(None if amx is None else amx.values.get("isa", amx.problem))
    error = kernels.values.get("error")
    if error is not None:
        yield _product(error)
    yield from _torch(kernels)


def _product(error: float) -> Finding:
    """Of the relative error of a product of 4-bit weights."""
    found = f"a product of 4-bit weights has a relative error of {error:.1e}"
    if error > _WRONG:
        return problem(_TOPIC, "kernels", found, f"set LLMPQ_ISA=avx2 or portable, and report it; or {_REBUILD}")
    return ok(_TOPIC, "kernels", found)


def _torch(kernels: Answer) -> Iterator[Finding]:
    if kernels.problem:
        advice = "run it again, as first imports are slow; else `pip install --force-reinstall torch`"
        yield problem("torch", "import", kernels.problem, advice)
        return
    cuda = kernels.values["cuda"]
    yield ok("torch", "build", f"{kernels.values['torch']}, {f'for CUDA {cuda}' if cuda else 'for CPUs'}")
    if not kernels.values["gloo"]:
        yield problem("torch", "gloo", "this build of torch is without it", "install torch from PyPI or pytorch.org")


def _missing(why: str) -> Finding:
    if "LLMPQ_ISA" in why:
        return problem(_TOPIC, "LLMPQ_ISA", why, f"unset it, or set it to one of {', '.join(get_args(Isa))}")
    if why.startswith("ModuleNotFoundError"):
        return problem(_TOPIC, "llmpq._cpu", "the kernels for CPUs are not built", _REBUILD)
    return problem(_TOPIC, "llmpq._cpu", f"the kernels for CPUs cannot be loaded: {why}", _REBUILD)


def _isa(used: str, read: Read, environment: Mapping[str, str]) -> Finding:
    capped, flags = environment.get("LLMPQ_ISA"), set(_flags(read))
    has = ", ".join(isa for isa, needed in _FLAGS.items() if needed <= flags)
    found = f"{used} is used" + (f"; the processor has {has}" if has else "")
    found += f"; LLMPQ_ISA={capped} allows no wider" if capped else ""
    if used == "portable" and not capped:
        advice = "expect it to be many times slower; nothing can be done on a processor without AVX2"
        return warning(_TOPIC, "instruction set", f"{found}: this processor has no AVX2", advice)
    return ok(_TOPIC, "instruction set", found)


def _amx(isa: str | None) -> Finding:
    """`isa`: what is used where AMX is asked for."""
    if isa is None:
        return ok(_TOPIC, "AMX", "this processor has none")
    if isa == "amx":
        return ok(_TOPIC, "AMX", "permitted, and used where LLMPQ_ISA or a device says isa=amx")
    advice = (
        "let the process ask for it (Linux 5.16, arch_prctl not filtered by the container), build with GCC 11 or newer"
    )
    return warning(_TOPIC, "AMX", f"the processor has it, but it cannot be used here: {isa} is", advice)


def _flags(read: Read) -> list[str]:
    return _line(read, "flags").split()


def _name(read: Read) -> str:
    lines = (read("/proc/cpuinfo") or "").splitlines()
    count = sum(line.startswith("processor") for line in lines)
    name = _line(read, "model name")
    return f"{name} x {count}" if name else "unknown: this system does not say"


def _line(read: Read, key: str) -> str:
    """The value of the first line of that key; empty where there is none."""
    lines = (read("/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
