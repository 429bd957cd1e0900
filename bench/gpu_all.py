"""All that a bare machine with a GPU is asked to do, in the order of its worth, within a given time.

    python3 -m bench.gpu_all [STEP ...] [--seconds 540] [--rehearse]

For Python with torch and triton, nvcc and cmake on PATH, no network; this file needs the standard library only. Without
steps named it takes all but `rest` in turn and leaves out those that passed before with the sources as they are; steps
that are named run in the order they are named, whether they passed or not (bench/timebox.py). All of them go on where
they stopped: tests that passed and rows that were measured are not repeated until the sources change.

    OUT             where results and the log go: gpu_all.json (what became of each step), gpu_all.log, and what each
                    step found; build/gpu_all/results if it is not set
    LLMPQ_WHEELS    a folder of wheels to install beside the project: what the machine lacks of what llmpq imports
    LLMPQ_PREBUILT  one with extensions built beforehand (bench/extensions.py); build/prebuilt if it is not set
    LLMPQ_RIVALS    one with those of humming-kernels, gemlite and bitsandbytes, and vLLM's _C_stable_libtorch.abi3.so,
                    plain or as .xz

What an earlier machine found and bench/results holds is known. --rehearse needs no GPU: every step imports, collects
and parses what it would run, and runs what a CPU can.

Exit code 0: every step passed; 1: one failed, ran out of time or was not run; 2: a bad option.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import extensions
from bench.timebox import Command, Step, TimeBox

ROOT = Path(__file__).resolve().parent.parent
REST = "rest"  # of the comparison with rivals: only where it is named
RECORD, PROFILES = "gpu_tests.jsonl", "gpu_profiles.txt"
KEPT = ("gpu_ceilings.json", "rivals_gpu.json", "gpu_decoder.json", RECORD, PROFILES)
SHAPES = ("--shapes", "8192x8192,28672x8192,4096x4096", "--dtypes", "bf16")
RIVALS = (
    "cuBLAS,GPU memory read,Marlin int4,Humming int4,Humming int3,Machete int4,torch _weight_int4pack_mm,"
    "bitsandbytes NF4"
)
# The files whose tests need a GPU, those first that tell most in little time; those that do not exist are left out.
PRODUCT_TESTS = (
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_gemm.py",
    "tests/kernels/test_compile.py",
    "tests/kernels/test_triton.py",
)
OPERATION_TESTS = (
    "tests/models/test_graphed_host.py",
    "tests/kernels/test_triton_operations.py",
    "tests/kernels/test_triton_draw.py",
    "tests/kernels/test_kv_attention.py",
    "tests/kernels/test_rows.py",
    "tests/models/test_portions.py",
    "tests/quant/test_quantize.py",
)


def steps(state: Path) -> tuple[Step, ...]:
    """All there are, in the order in which they are worth their time. What they find goes to `state`."""

    def every_rival(*options: str) -> Command:
        out = ("--json-out", str(state / "rivals_gpu.json"), "--budget-seconds", "{seconds}")
        return module("bench.kernels.rivals_gpu", *out, *options)

    def rivals(*options: str) -> Command:
        return every_rival(*SHAPES, *options)

    def ceilings() -> list[Command]:
        return [module("bench.kernels.gpu_ceilings", "--json-out", str(state / "gpu_ceilings.json"))]

    def small() -> list[Command]:
        return [module("bench.kernels.gpu_small", "--backends", "cuda")]

    def ratios() -> list[Command]:
        rows = ("--rows", "1,16,64", "--rounds", "5")
        return [rivals("--backends", "cuda", "--rivals", "cuBLAS,GPU memory read", *rows)]

    def against_others() -> list[Command]:
        return [rivals("--rivals", RIVALS, "--bits", "4,3", "--rows", "1,16", "--backends", "cuda")]

    def triton() -> list[Command]:
        few = module("bench.kernels.gpu_small", "--backends", "triton", "--few")
        ratios = rivals("--backends", "triton", "--rivals", "cuBLAS", "--rows", "1,16")
        return [few, *tests(state, PRODUCT_TESTS, "triton or compiled"), ratios]

    cuda, cpu = partial(extensions.commands, state, "_cuda"), partial(extensions.commands, state, "_cpu")
    products = partial(tests, state, PRODUCT_TESTS, "not triton and not compiled")
    operations = partial(tests, state, OPERATION_TESTS, "triton or graphed or gpu")
    return (
        Step("check", 15, 60, check),
        Step("build", 45, 180, cuda, after=("check",), background=True),
        Step("ceilings", 15, 45, ceilings),
        Step("small", 25, 60, small, needs=("build",)),
        Step("ratios", 35, 75, ratios, needs=("build",)),
        # Not earlier: compilers would take the processors from those who start the products that are timed.
        Step("build_cpu", 60, 240, cpu, after=("build",), background=True),
        Step("products", 60, 120, products, needs=("build",)),
        Step("operations", 45, 100, operations, after=("build",)),
        Step("profiles", 35, 60, profiles, needs=("build",)),
        Step("sanitizers", 45, 120, sanitizers, needs=("build",)),
        Step("rivals", 85, 200, against_others, needs=("build",), after=("build_cpu",)),
        Step("triton", 55, 150, triton, after=("build",)),
        Step("decoder", 70, 200, partial(decoder, state), after=("build",)),
        Step("run", 45, 120, partial(run, state), after=("build", "build_cpu")),
        Step(REST, 0, 3600, lambda: [every_rival()], needs=("build",)),
    )


def module(name: str, *arguments: str, wrapped: Sequence[str] = (), **env: str) -> Command:
    """`python -m name arguments`, within another program if need be; in a rehearsal its arguments are parsed."""
    parsing = f"import sys; from {name} import parse; parse(sys.argv[1:]); print('{name}: parsed')"
    rehearsal = (sys.executable, "-c", parsing, *arguments)
    return Command((*wrapped, sys.executable, "-m", name, *arguments), rehearsal, tuple(env.items()))


def check() -> list[Command]:
    versions = (
        "import sys, torch, triton, transformers; cuda = torch.cuda.is_available()\n"
        "print(sys.version, torch.__version__, triton.__version__, transformers.__version__, sep='; ')\n"
        "print(torch.cuda.get_device_properties(0) if cuda else 'torch sees no CUDA device')\n"
        "sys.exit(not cuda and 'rehearsal' not in sys.argv)"
    )
    python = (sys.executable, "-c", versions)
    return [Command(("nvidia-smi",)), Command(python, (*python, "rehearsal"))]


def tests(state: Path, files: Sequence[str], selection: str) -> list[Command]:
    """Those of some files that pytest's -k selects and that have not passed yet, side by side."""
    there = [name for name in files if (ROOT / name).exists()]
    pytest = (sys.executable, "-m", "pytest", "-p", "no:benchmark", *there, "-k", selection)
    options = ("-p", "tests.support.resume", "-n", str(min(14, os.cpu_count() or 1)), "--tb=short")
    limit = ("--timeout", "60", "--timeout-method", "thread")  # which ends a process that a kernel holds up
    record = (("LLMPQ_TEST_RECORD", str(state / RECORD)), ("LLMPQ_TEST_SOURCES", sources()))
    return [Command((*pytest, *options, *limit), (*pytest, "--collect-only", "-qq"), record)]


def profiles() -> list[Command]:
    """What ncu says of three kernels: why they are as fast as they are."""
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "LaunchStats")
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += [part for name in (*sections, "Occupancy", "InstructionStats") for part in ("--section", name)]
    command = module("bench.kernels.gpu_profiled", wrapped=ncu)
    return [Command(command.argv, command.rehearsal, output=PROFILES)]


def sanitizers() -> list[Command]:
    return [
        module(
            "bench.kernels.gpu_small",
            *("--backends", "cuda", "--few"),
            wrapped=("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # so every tensor ends where its allocation does
        )
        for tool in ("memcheck", "racecheck")
    ]


def decoder(state: Path) -> list[Command]:
    """A decoder of Llama's shapes with random weights, and transformers' own."""
    python = (sys.executable, "-m", "bench.end_to_end.gpu_decoder", "--json-out", str(state / "gpu_decoder.json"))
    return [
        Command((*python, "--budget-seconds", "{seconds}"), (*python, "--model", "tiny", "--device", "cpu")),
    ]


def run(state: Path) -> list[Command]:
    """`llmpq run` on a checkpoint of random weights: on the GPU alone, and in two stages, the first on the CPU."""
    make = (sys.executable, "-m", "bench.end_to_end.random_checkpoint")
    folder = str(state / "checkpoint")
    cache = (("LLMPQ_CACHE", str(state / "cache")),)

    def asking(devices: str, group: str, *options: str) -> tuple[str, ...]:
        command = (sys.executable, "-m", "llmpq.run", "--model", folder, "--devices", devices, "--bits", "4")
        prompts = ("--prompt", "The quick brown fox", "--prompt", "jumps over", "--max-new-tokens", "32")
        return (*command, "--group-size", group, "--no-log", *prompts, *options)

    both = ("--all-devices", "--pin", "layer.0=cpu0", "--activations", "a16")
    return [
        Command((*make, folder, "--model", "short"), (*make, folder, "--model", "tiny", "--device", "cpu")),
        Command(asking("cuda:0", "128"), asking("cpu:threads=1", "32"), cache),
        Command(asking("cpu:threads=8;cuda:0", "128", *both), asking("cpu;cpu", "32", *both), cache),
    ]


def sources() -> str:
    """A name for the state of what is tested and measured."""
    digest = hashlib.sha256()
    suffixes = (".py", ".cu", ".cuh", ".cpp", ".h", ".json")
    for folder in ("csrc", "llmpq", "planner", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "results" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def install(box: TimeBox, state: Path) -> None:
    """What LLMPQ_WHEELS and LLMPQ_RIVALS name, beside the project, once. All processes find it."""
    site = state / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile")
    for folder in (Path(os.environ[name]) for name in ("LLMPQ_WHEELS", "LLMPQ_RIVALS") if os.environ.get(name)):
        for archive in sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")]):
            done = state / f"{archive.name}.installed"
            if not done.exists():  # one by one: an archive that cannot be installed keeps no other from it
                box.call("check", Command((*pip, "--no-build-isolation", "--target", str(site), str(archive))), 60)
                done.touch()
        for library in sorted(folder.glob("_C_stable_libtorch.abi3.so*")):
            if library.suffix == ".xz":
                packed, library = library, state / library.stem
                if not library.exists():
                    extensions.unpack(packed, library)
            os.environ.setdefault("LLMPQ_VLLM_LIBRARY", str(library.resolve()))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(site), os.environ.get("PYTHONPATH")]))
    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"  # where nvcc, ncu and compute-sanitizer usually lie
    os.environ["PYTHONUNBUFFERED"] = "1"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    known = [step.name for step in steps(Path())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=540, help="for all steps together (default: 540)")
    parser.add_argument("--rehearse", action="store_true", help="import, collect and parse only; no GPU is needed")
    arguments = parser.parse_args(argv)
    for name in arguments.steps:
        if name not in known:
            parser.error(f"{name} is no step; there are {', '.join(known)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    state = ROOT / "build" / ("gpu_rehearsal" if arguments.rehearse else "gpu_all")
    state.mkdir(parents=True, exist_ok=True)
    for name in KEPT:  # what an earlier machine found
        if (known := ROOT / "bench" / "results" / name).exists() and not (state / name).exists():
            shutil.copy2(known, state / name)
    results = Path(os.environ.get("OUT") or state / "results")
    os.chdir(ROOT)
    box = TimeBox(arguments.seconds, state, results, KEPT, sources(), rehearse=arguments.rehearse)
    by_name = {step.name: step for step in steps(state)}
    chosen = [by_name[name] for name in arguments.steps or by_name if arguments.steps or name != REST]
    try:
        install(box, state)
        # What the machine is, and what is built there, is looked at every time.
        skip = [] if arguments.steps else [name for name in by_name if name not in ("check", "build", "build_cpu")]
        box.run(chosen, skip=skip)
    finally:
        box.collect()
        lines, code = box.summary(chosen)
        print(f"\nresults are in {results}", *lines, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
