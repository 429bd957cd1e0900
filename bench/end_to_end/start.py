"""How long a stage takes to have its weights ready, how much it reads for that, and how much memory it takes.

python -m bench.end_to_end.start [--model demo] [--stages 1 2] [--threads 2] [--trials 5] [--json-out FILE]

The model is split evenly. Each stage is one process, which has loaded once before it is watched. Units are native;
those that the file has in no such form take 16 bits, so that nothing comes from the cache. "Cold" is without the files
in the page cache: they are copies, which no other process reads. "Read" is to read the stage's tensors one after the
other without a look at them. Times are the least of the trials. They include finding and describing the model, which is
done once, by the process that starts the workers; the bytes that are read and the memory are a worker's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.machine import describe, write_results
from llmpq.checkpoint.model_files import describe as described
from llmpq.checkpoint.model_files import open_model, resolve
from llmpq.checkpoint.tensor_index import PieceEntry, TensorEntry
from llmpq.checkpoint.weights import open_weights
from llmpq.host_limits import usable_cores
from llmpq.models.arena import return_free_memory
from llmpq.models.decoder_stage import build_stage
from llmpq.runtime.memory_watch import resident_bytes
from llmpq.spec import NATIVE, W16, Cluster, Device, ModelSpec, Placement, Plan, Stage

_PERIOD_S = 0.001


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="MODEL")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    with TemporaryDirectory() as folder:
        path = resolve(arguments.model).path
        copy = Path(folder) / path.name
        shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
        for stages in arguments.stages:
            for stage in range(stages):
                job = [str(copy), str(stages), str(stage), str(arguments.trials)]
                command = [sys.executable, "-c", "import bench.end_to_end.start as start; start.child()", *job]
                environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
                answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append({"stages": stages, "stage": stage, **json.loads(answer)})
                print(rows[-1], flush=True)
    if arguments.json_out:
        header = {"model": arguments.model, "threads": arguments.threads, "trials": arguments.trials}
        write_results(arguments.json_out, describe() | header | {"rows": rows})


def child() -> None:
    """Print what loading one stage takes, as JSON. The arguments are path, stages, the stage's index and trials."""
    path, stages, index, trials = sys.argv[1], *map(int, sys.argv[2:])
    spec = open_model(path).spec
    plan = even_plan(spec, stages)
    entries = tensors_of(path, spec, plan, index)

    def load() -> object:
        return build_stage(spec, open_weights(resolve(path), spec), plan, index, torch.device("cpu"))

    def start() -> object:
        return open_model(path), load()

    def timed(work: Callable[[], object], *, cold: bool) -> float:
        if cold:
            forget(entries)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    load()
    forget(entries)
    return_free_memory()
    before, idle = storage_bytes(), resident_bytes()
    with most_resident() as peak:
        load()
    sizes = {unit: spec.unit_bytes(unit, plan.precision(unit)) for unit in units_of(spec, plan, index)}
    found: dict[str, float] = {
        "own_bytes": sum(entry.nbytes for entry in entries),
        "read_bytes": storage_bytes() - before,
        "weight_bytes": sum(sizes.values()),
        "layer_bytes": max(size for unit, size in sizes.items() if unit.startswith("layer.")),
        "peak_bytes": peak[0] - idle,
    }
    for name, work in (("load", start), ("read", lambda: read_plainly(entries))):
        for cold in (True, False):
            kind = f"{'cold' if cold else 'warm'}_{name}_s"
            found[kind] = min(timed(work, cold=cold) for _ in range(trials))
    print(json.dumps(found))


def even_plan(spec: ModelSpec, stages: int) -> Plan:
    """The model on so many CPUs, as many layers on each as on any other or one more."""
    names = [f"cpu{i}" for i in range(stages)]
    ends = [spec.num_layers * i // stages for i in range(stages + 1)]
    whole = Plan.single(spec, Device(names[0], "cpu"), W16, slots=1, max_length=16)
    split = replace(
        whole,
        cluster=Cluster(tuple(Device(name, "cpu") for name in names)),
        stages=tuple(
            Stage(name, (start, end), (W16,) * (end - start)) for name, start, end in zip(names, ends, ends[1:])
        ),
        head=Placement(stages - 1, W16),
    )
    return split.with_precisions([NATIVE if spec.stored else W16 for _ in spec.units])


def units_of(spec: ModelSpec, plan: Plan, index: int) -> list[str]:
    """The units of a stage. A tied table that embedding and head share belongs to the first of them."""
    units = [f"layer.{i}" for i in range(*plan.stages[index].layers)]
    if index == plan.embedding.stage:
        units.insert(0, "embedding")
    if index == plan.head.stage and not (spec.tied_embeddings and "embedding" in units):
        units.append("head")
    return units


def tensors_of(path: str, spec: ModelSpec, plan: Plan, index: int) -> list[TensorEntry]:
    """The tensors of a stage, in the order in which they lie in the files."""
    units = {*units_of(spec, plan, index)}
    if index == plan.head.stage:
        units |= {"head", "embedding"} if spec.tied_embeddings else {"head"}
    located = described(resolve(path)).locate(spec)
    found = {entry for (unit, _), entries in located.items() if unit in units for entry in entries}
    tensors = [
        entry.tensor for entry in found if isinstance(entry, PieceEntry) and isinstance(entry.tensor, TensorEntry)
    ]
    files = (tensor for tensor in tensors if isinstance(tensor, TensorEntry))
    return sorted(files, key=lambda entry: (entry.path, entry.offset))


def forget(entries: Sequence[TensorEntry]) -> None:
    """Let the page cache drop the files of tensors, which nothing maps any more."""
    gc.collect()
    for path in {entry.path for entry in entries}:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(entries: Sequence[TensorEntry]) -> None:
    buffer = memoryview(bytearray(2**20))
    for path in dict.fromkeys(entry.path for entry in entries):
        with path.open("rb", buffering=0) as file:
            for entry in entries:
                if entry.path == path:
                    file.seek(entry.offset)
                    left = entry.nbytes
                    while left:
                        left -= file.readinto(buffer[: min(left, len(buffer))]) or left


def storage_bytes() -> int:
    """What this process has had fetched from storage (Linux)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("no read_bytes in /proc/self/io")


@contextmanager
def most_resident() -> Iterator[list[int]]:
    """One number, once it is left: the most anonymous memory that the process had meanwhile."""
    peak, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_PERIOD_S):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], resident_bytes())


if __name__ == "__main__":
    main()
