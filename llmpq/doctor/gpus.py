"""The GPUs, or why there is none: driver, torch's build, the kernels for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from llmpq.doctor.finding import Finding, ok, warning
from llmpq.doctor.probing import Answer
from llmpq.host_limits import Read, read_file
from llmpq.spec.formatting import format_bytes

_TOPIC = "GPUs"
_HIDDEN = ("", "-1", "NoDevFiles")


def driver_version(read: Read = read_file) -> str | None:
    """Of NVIDIA's driver, as its kernel module says; None where none is loaded."""
    line = next(iter((read("/proc/driver/nvidia/version") or "").splitlines()), "")
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", line.partition("Kernel Module")[2] or line)
    return found[1] if found else None


def gpu_findings(
    driver: str | None,
    listed: Answer | None,
    seen: Answer | None,
    extension: Answer,
    torch: Answer,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Finding]:
    """`listed`: what nvidia-smi prints, a GPU a line, None without it; `seen`: what torch sees, None if not asked;
    `extension`: of importing llmpq._cuda; `torch`: of its build (questions.torch_build).
    """
    if driver is None and listed is None:
        yield ok(_TOPIC, "devices", "none: no driver of NVIDIA's is loaded, and there is no nvidia-smi")
        yield _unneeded(extension)
        return
    if driver is not None:
        yield ok(_TOPIC, "driver", driver)
    names: list[str] = []
    if listed is not None and listed.problem:
        advice = "look at `dmesg`; a driver in that state needs a restart of the machine"
        yield warning(_TOPIC, "nvidia-smi", listed.problem, advice)
    elif listed is not None:
        names = [line.strip() for line in listed.values["text"].splitlines() if line.strip()]
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    cuda = torch.values.get("cuda")
    if cuda is None and not torch.problem:
        found = f"{len(names) or 'some'} GPUs, but torch is a build without CUDA"
        yield warning(_TOPIC, "devices", found, "install a CUDA build of torch (pytorch.org), then llmpq again")
    elif hidden in _HIDDEN:
        yield ok(_TOPIC, "devices", f"none: CUDA_VISIBLE_DEVICES={hidden!r} hides them")
    elif seen is None or seen.problem:
        why = "torch was not asked" if seen is None else seen.problem
        advice = "compare the driver with torch's CUDA version; runs on CPUs work without"
        named = "torch" if cuda is None else f"torch for CUDA {cuda}"
        yield warning(_TOPIC, "devices", f"{named} sees none: {why}", advice)
    else:
        yield from (_seen(index, gpu) for index, gpu in enumerate(seen.values["gpus"]))
    if seen is None or seen.problem or not seen.values["gpus"]:
        yield _unneeded(extension)
    elif extension.problem:
        advice = "install llmpq again with nvcc on the PATH; until then Triton multiplies, or torch"
        yield warning(_TOPIC, "llmpq._cuda", f"the CUDA kernels cannot be used: {extension.problem}", advice)
    else:
        yield ok(_TOPIC, "llmpq._cuda", "built")


def _seen(index: int, gpu: Mapping[str, object]) -> Finding:
    refused = gpu["refused"]
    assert isinstance(refused, Mapping)
    total, free = (float(str(gpu[name])) for name in ("memory_bytes", "free_bytes"))
    numbers = {"memory_bytes": total, "free_bytes": free}
    found = f"{gpu['name']}, capability {gpu['capability']}, {format_bytes(free)} free of {format_bytes(total)}"
    usable = [backend for backend, reason in refused.items() if reason is None]
    if not usable:
        reasons = "; ".join(str(reason) for reason in refused.values())
        advice = "build the CUDA kernels or install triton: else torch multiplies dequantized weights, which is slow"
        return warning(_TOPIC, f"cuda:{index}", f"{found}; no kernels: {reasons}", advice, numbers)
    return ok(_TOPIC, f"cuda:{index}", f"{found}; kernels: {', '.join(usable)}", numbers)


def _unneeded(extension: Answer) -> Finding:
    if not extension.problem:
        return ok(_TOPIC, "llmpq._cuda", "built, and not needed here")
    return ok(_TOPIC, "llmpq._cuda", f"not loaded, and not needed here ({extension.problem})")
