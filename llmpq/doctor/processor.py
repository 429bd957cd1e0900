"""The CPU's kernels: whether they are built and right, and which instruction set they use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import get_args

from llmpq.doctor.finding import Finding, ok, problem, unanswered, warning
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
    torch: Answer,
    kernels: Answer,
    read: Read = read_file,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Finding]:
    """`extension`: of importing llmpq._cpu; `amx`: the same with LLMPQ_ISA=amx, None where there is no AMX; `torch` and
    `kernels`: of its build and of a product (questions.py).
    """
    yield ok(_TOPIC, "name", _name(read))
    if extension.problem:
        yield _missing(extension)
    else:
        yield _isa(extension.values["isa"], read, environment)
        yield _amx(amx)
    if not (kernels.problem and (extension.problem or torch.problem)):  # else those say why
        yield _product(kernels)
    yield from _torch(torch)


def _product(kernels: Answer) -> Finding:
    """Of a product of 4-bit weights."""
    if kernels.problem:
        return unanswered(_TOPIC, "kernels", kernels, _REBUILD)
    error = kernels.values["error"]
    found = f"a product of 4-bit weights has a relative error of {error:.1e}"
    if error > _WRONG:
        return problem(_TOPIC, "kernels", found, f"set LLMPQ_ISA=avx2 or portable, and report it; or {_REBUILD}")
    return ok(_TOPIC, "kernels", found)


def _torch(build: Answer) -> Iterator[Finding]:
    if build.problem:
        yield unanswered("torch", "import", build, "run `pip install --force-reinstall torch`")
        return
    cuda = build.values["cuda"]
    yield ok("torch", "build", f"{build.values['version']}, {f'for CUDA {cuda}' if cuda else 'for CPUs'}")
    if not build.values["gloo"]:
        yield problem("torch", "gloo", "this build of torch is without it", "install torch from PyPI or pytorch.org")


def _missing(extension: Answer) -> Finding:
    why = extension.problem
    if extension.late:
        return unanswered(_TOPIC, "llmpq._cpu", extension, _REBUILD)
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


def _amx(asked: Answer | None) -> Finding:
    """`asked`: what is used where AMX is asked for; None where there is none."""
    if asked is None:
        return ok(_TOPIC, "AMX", "this processor has none")
    advice = "use Linux 5.16 or newer, a container that permits arch_prctl, and kernels built with GCC 11 or newer"
    if asked.late:
        return unanswered(_TOPIC, "AMX", asked, advice)
    used = asked.values.get("isa")
    if used == "amx":
        return ok(_TOPIC, "AMX", "permitted, and used where LLMPQ_ISA or a device says isa=amx")
    found = "the processor has it, but " + (f"{used} is used in its place" if used else f"not here: {asked.problem}")
    return warning(_TOPIC, "AMX", found, advice)


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
