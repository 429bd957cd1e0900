"""What a process of its own finds out: `QUESTION ARGUMENTS...`, answered by one JSON object as the last line of stdout.

An error is an object with `problem` alone. Each question imports what it needs when it is asked.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmpq.spec import one_line

Values = dict[str, Any]


def module(name: str) -> Values:
    """Whether a module can be imported; where it has kernels for CPUs, the instruction set they would use."""
    imported = importlib.import_module(name)
    return {"isa": imported.isa()} if hasattr(imported, "isa") else {}


def torch_build() -> Values:
    """torch's version, the CUDA that it was built for (None: without), and whether it has gloo."""
    import torch
    import torch.distributed as dist

    gloo = dist.is_available() and dist.is_gloo_available()
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gloo": gloo}


def kernels() -> Values:
    """The relative error of a product of the CPU's kernels against the dequantized weight."""
    import torch

    from llmpq.kernels import gemm, prepare
    from llmpq.quant.rtn import round_to_nearest
    from llmpq.spec import Precision

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 256, generator=generator) for rows in (64, 3))
    quantized = round_to_nearest(weight, Precision(4, 64), torch.float16)
    exact = x.double() @ quantized.dequantize().double().T
    found = gemm(x, prepare(quantized, backend="cpu"))
    return {"error": float((found.double() - exact).norm() / exact.norm())}


def visible_gpus() -> Values:
    """The GPUs that torch sees, and which backends multiply on each."""
    import torch

    if not torch.cuda.is_available():
        torch.cuda.init()  # raises and says why
    from llmpq.kernels.registry import check_backend

    def refused(backend: str, device: torch.device) -> str | None:
        try:
            check_backend(backend, device)
        except ValueError as error:
            return one_line(str(error))
        return None

    found = []
    for index in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": total,
                "free_bytes": free,
                "refused": {backend: refused(backend, device) for backend in ("cuda", "triton")},
            }
        )
    return {"gpus": found}


def solver() -> Values:
    """Which solver plans are made with, and whether it finds the best of a small program: at most 7 of x + 2 y."""
    import math

    import mip

    from planner.clock import Clock
    from planner.solver import solving

    with solving.new_model() as model:
        x, y = (model.add_var(var_type=mip.INTEGER, ub=5) for _ in range(2))
        model += x + 2 * y <= 7
        model.objective = -3 * x - 4 * y
        status = solving.optimize(model, Clock(math.inf))
        return {"solver": solving.SOLVER, "right": status == solving.OPTIMAL and round(model.objective_value) == -19}


def folder(path: str) -> Values:
    """Whether files can be written there, or where it would be made, and the free bytes there."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"\0")
        file.flush()
    return {"free_bytes": free}


def network(*hosts: str) -> Values:
    """This host's interfaces, and whether each is up; the interface on the way to each of `hosts`."""
    from llmpq.runtime.peers import interface_of

    def outward(host: str) -> Values:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # of datagrams: nothing is sent
                own = str(probe.getsockname()[0])
        except OSError as error:
            return {"problem": error.strerror or str(error)}
        return {"address": own, "interface": interface_of(own), "here": own == address[0]}

    interfaces = {}
    for _, name in socket.if_nameindex():
        flags = None
        with suppress(OSError, ValueError):
            flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)
        interfaces[name] = flags is None or bool(flags & 1)  # IFF_UP
    return {"interfaces": interfaces, "ways": {host: outward(host) for host in hosts}}


def links(devices: str, seconds: str) -> Values:
    """How fast links between devices of this host are, given as JSON; see link_speed.measure."""
    from llmpq.doctor.link_speed import measure
    from llmpq.spec import Device

    found = measure([Device.from_dict(device) for device in json.loads(devices)], float(seconds))
    return {"links": [[*ends, *speed] for ends, speed in found.items()]}


QUESTIONS: dict[str, Callable[..., Values]] = {
    question.__name__: question
    for question in (module, torch_build, kernels, visible_gpus, solver, folder, network, links)
}


def main() -> None:
    try:
        values = QUESTIONS[sys.argv[1]](*sys.argv[2:])
    except Exception as error:
        values = {"problem": one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)}
    print(f"\n{json.dumps(values)}", flush=True)
    os._exit(0)  # without destructors, which may wait for hardware
