"""vLLM and SGLang: one process for each pipeline stage, layers by an environment variable.

vLLM: VLLM_PP_LAYER_PARTITION is read by get_pp_indices in vllm/distributed/utils.py: as many numbers as stages, which
add up to the layers; the first stage has the embedding, the last the head. --pipeline-parallel-size, --max-model-len,
--max-num-seqs and --dtype are in docs/serving/engine_args, several hosts (--nnodes, --node-rank, --master-addr,
--headless) in docs/serving/parallelism_scaling.md, CPUs (pipeline parallelism, GPTQ, VLLM_CPU_OMP_THREADS_BIND with a
range of cores for each rank) in docs/getting_started/installation/cpu.md.

SGLang: SGLANG_PP_LAYER_PARTITION is read the same way in python/sglang/srt/distributed/utils.py. --pp-size,
--pp-max-micro-batch-size, --prefill-max-requests, --max-running-requests, --context-length, --dtype, --nnodes,
--node-rank and --dist-init-addr are in docs/advanced_features/server_arguments.md.

Both number GPUs in the order of CUDA_VISIBLE_DEVICES, and have the same number of ranks on each host.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from llmpq.engines.export import Export, Job, layer_count, named_cpus, shell_script
from llmpq.engines.folder_weights import Weights, check_weights_fit, gptq_weights
from llmpq.engines.losses import cache_loss, common_losses, microbatch_loss
from llmpq.spec import Device

_PORT = "20000"  # any that is free on the first host

Hosts = list[tuple[str, list[Device]]]  # in the order of the stages


def for_vllm(job: Job) -> Export:
    """For `vllm serve`. Raises UsageError."""
    kinds = {device.kind for _, device in job.stages}
    if len(kinds) > 1:
        raise job.refuse(
            f"{named_cpus(job)} beside GPUs, and vLLM runs on GPUs or on CPUs; plan for one kind (--without)"
        )

    def command(weights: Weights, hosts: Hosts, rank: int) -> list[str]:
        words = ["vllm", "serve", weights.model, "--pipeline-parallel-size", str(len(job.stages))]
        words += ["--dtype", job.spec.dtype, "--max-model-len", str(job.plan.max_length)]
        words += ["--max-num-seqs", str(job.plan.slots)]
        if len(hosts) > 1:
            words += ["--nnodes", str(len(hosts)), "--node-rank", str(rank), "--master-addr", hosts[0][0]]
            words += ["--headless"] if rank else []
        return words

    instead = "vLLM makes its own batches, of --max-num-batched-tokens at most"
    return _exported(job, "VLLM_PP_LAYER_PARTITION", command, microbatch_loss(job, instead))


def for_sglang(job: Job) -> Export:
    """For `python -m sglang.launch_server`. Raises UsageError."""
    if any(device.kind == "cpu" for _, device in job.stages):
        raise job.refuse(f"{named_cpus(job)}, and SGLang's stages are on GPUs; plan for GPUs alone (--without)")

    def command(weights: Weights, hosts: Hosts, rank: int) -> list[str]:
        plan = job.plan
        words = ["python", "-m", "sglang.launch_server", "--model-path", weights.model]
        words += ["--pp-size", str(len(job.stages)), "--dtype", job.spec.dtype]
        words += ["--context-length", str(plan.max_length), "--max-running-requests", str(plan.slots)]
        words += ["--pp-max-micro-batch-size", str(plan.decode_microbatch)]
        words += ["--prefill-max-requests", str(plan.prefill_microbatch)]
        if len(hosts) > 1:
            words += ["--nnodes", str(len(hosts)), "--node-rank", str(rank)]
            words += ["--dist-init-addr", f"{hosts[0][0]}:{_PORT}"]
        return words

    instead = "SGLang takes them as limits, and cuts prompts into chunks of its own"
    return _exported(job, "SGLANG_PP_LAYER_PARTITION", command, microbatch_loss(job, instead))


def _exported(
    job: Job, variable: str, command: Callable[[Weights, Hosts, int], list[str]], microbatches: str
) -> Export:
    """A script for each host, `command` for the one of a rank."""
    counts = [layer_count(stage) for stage, _ in job.stages]
    empty = [device.name for stage, device in job.stages if not layer_count(stage)]
    if empty:
        raise job.refuse(f"{', '.join(empty)} has no layer, and each of its stages has some; plan with --without")
    job.check_own_gpus()
    weights = gptq_weights(job)
    check_weights_fit(job, weights)
    hosts = _hosts(job)
    files = {}
    for rank, (host, devices) in enumerate(hosts):
        variables = {variable: ",".join(map(str, counts)), **_placement(devices)}
        name = "serve.sh" if len(hosts) == 1 else f"serve-{rank}-{_file_name(host)}.sh"
        files[name] = shell_script([*weights.commands, command(weights, hosts, rank)], variables)
    lost = [*weights.lost, microbatches, *cache_loss(job, job.engine, ", its --dtype")]
    if any(stage.compute_dtype != job.spec.dtype for stage, _ in job.stages):
        lost.append(f"computing in {job.stages[0][0].compute_dtype}: {job.engine} computes in {job.spec.dtype}")
    return Export(files, (*lost, *common_losses(job)))


def _hosts(job: Job) -> Hosts:
    """Raises UsageError unless each host has as many stages, which follow each other."""
    hosts = [(host, list(devices)) for host, devices in groupby((d for _, d in job.stages), key=lambda d: d.host)]
    names, counts = [host for host, _ in hosts], [len(devices) for _, devices in hosts]
    if len(set(names)) < len(names):
        raise job.refuse(f"stages of one host lie apart ({', '.join(names)}), and its ranks follow each other")
    if len(names) > 1 and names[0] == "localhost":
        raise job.refuse("its first host is localhost, which others know by another name; name it in the cluster file")
    if len(set(counts)) > 1:
        said = ", ".join(f"{host} {count}" for host, count in zip(names, counts, strict=True))
        raise job.refuse(f"its hosts have different numbers of stages ({said}), and {job.engine} wants as many on each")
    return hosts


def _placement(devices: list[Device]) -> dict[str, str]:
    """The GPUs of a host in the order of the stages; of CPUs, cores one after another."""
    if devices[0].kind == "cuda":
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(device.index) for device in devices)}
    ranges, first = [], 0
    for device in devices:
        last = first + device.threads - 1
        ranges.append(f"{first}-{last}" if last > first else str(first))
        first = last + 1
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(ranges)}


def _file_name(host: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in host)
