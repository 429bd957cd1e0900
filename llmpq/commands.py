"""What each command does, from parsed arguments to files and text. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import planner
from llmpq import demo, display, refit, runlog, tracing
from llmpq.kernels import cpu
from llmpq.measure.perplexity import perplexity
from llmpq.measure.text import evaluation_text, read_text
from llmpq.planning import (
    Model,
    make_plan,
    measured_profile,
    measured_sensitivity,
    open_model,
    same_devices,
    workload_of,
)
from llmpq.prompts import read_lengths, read_prompts
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.torchrun import Rank
from llmpq.spec import (
    Cluster,
    Device,
    InvalidField,
    Output,
    Plan,
    Profile,
    Report,
    Sensitivity,
    UsageError,
    Workload,
    parse_devices,
)

_CONSTRAINTS = {  # name in the arguments -> option
    "group_size": "--group-size",
    "activations": "--activations",
    "objective": "--objective",
    "theta": "--theta",
    "min_bits": "--min-bits",
    "fixed_bits": "--bits",
    "all_devices": "--all-devices",
    "required": "--use",
    "excluded": "--without",
    "pinned": "--pin",
    "unit_bits": "--unit-bits",
    "prefill_microbatch": "--prefill-microbatch",
    "decode_microbatch": "--decode-microbatch",
    "max_ttft_s": "--max-ttft",
    "max_tpot_s": "--max-tpot",
}


def _check_writable(*paths: str | None) -> None:
    """Refuse output files that cannot be written before minutes of work are spent on their content."""
    for path in filter(None, paths):
        target = Path(path).absolute()
        place = target if target.exists() else target.parent
        if target.is_dir() or not os.access(place, os.W_OK):
            raise UsageError(f"cannot write {path}: {place} cannot be written to")


def _cluster(arguments: Namespace) -> Cluster:
    if arguments.devices is not None:
        return parse_devices(arguments.devices)
    if arguments.cluster is not None:
        return Cluster.load(arguments.cluster)
    return demo.cluster(cpu.isa())


def constraints_of(arguments: Namespace) -> planner.Constraints:
    given = {name: getattr(arguments, name) for name in _CONSTRAINTS if hasattr(arguments, name)}
    given |= {name: tuple(given[name]) for name in ("required", "excluded") if name in given}
    given |= {name: dict(given[name]) for name in ("pinned", "unit_bits") if name in given}
    try:
        given |= {"unit_bits": {unit: int(bits) for unit, bits in given.get("unit_bits", {}).items()}}
    except ValueError:
        raise UsageError("--unit-bits wants a width in bits, such as head=8") from None
    constraints = planner.Constraints(**given)
    if constraints.fixed_bits is not None and constraints.fixed_bits < constraints.min_bits:
        raise UsageError(f"--bits {constraints.fixed_bits} is below --min-bits {constraints.min_bits}")
    if not (math.isfinite(constraints.theta) and constraints.theta >= 0):
        raise UsageError(f"--theta is {constraints.theta:g}; it is the price of sensitivity in seconds, 0 or more")
    return constraints


def _sampling(arguments: Namespace) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=arguments.max_new_tokens or demo.MAX_NEW_TOKENS,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    except InvalidField as error:
        raise UsageError(f"--{error.path.replace('_', '-')} {error.problem}") from None


def _prompts(arguments: Namespace) -> list[str]:
    prompts = list(arguments.prompt or ())
    if arguments.prompts is not None:
        prompts += read_prompts(arguments.prompts)
    elif not prompts:
        prompts = list(demo.PROMPTS)
    for i, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UsageError(f"prompt {i} is empty")
    return prompts


def run(arguments: Namespace) -> None:
    """`llmpq run`: plan, load, generate, and compare what was predicted with what was measured."""
    rank = Rank.current()
    if rank is not None and not rank.first:
        _serve(arguments, rank)
        return
    _check_writable(arguments.output, arguments.json_out, arguments.trace, arguments.log)
    sampling = _sampling(arguments)
    given = None if arguments.plan is None else _given_plan(arguments)
    cluster, constraints = _cluster(arguments), constraints_of(arguments)
    if arguments.devices is None and arguments.cluster is None:
        constraints = replace(constraints, all_devices=True)  # the demo's devices are there to show a pipeline
    costs = None if arguments.costs is None else Profile.load(arguments.costs)
    prompts = _prompts(arguments)
    quiet = arguments.quiet
    with display.status(quiet) as notify:
        notify("opening the model")
        model = open_model(arguments.model, arguments.load_format)
        token_ids = [model.tokenizer.encode_chat(prompt) for prompt in prompts]
        workload = workload_of(model.spec, token_ids, sampling.max_tokens, arguments.batch_size)
        if given is not None:
            plan = given
            _check_room(plan, model, workload, arguments)
            local = all(device.host == "localhost" for device in plan.cluster.devices)
            if costs is None and local and not arguments.dry_run:
                costs = measured_profile(model, plan.cluster, _reach(plan, workload), as_planned(plan), notify)
            if costs is None and plan.predicted is None:
                raise UsageError(f"{arguments.plan} predicts nothing; give --costs from `llmpq profile`")
        else:
            plan, costs = make_plan(model, cluster, workload, constraints, costs=costs, notify=notify)
        if rank is not None:
            _share(rank, plan)
    if not quiet:
        display.OUT.print(display.plan_table(plan))
    if arguments.dry_run:
        return
    with display.status(quiet) as notify:
        notify("loading the stages")
        engine = Engine(plan, model.checkpoint, model.spec, rank=rank, on_load=lambda stage: notify(f"loaded {stage}"))
    with engine, display.progress(quiet, len(prompts) * sampling.max_tokens) as on_progress:
        result = engine.generate(token_ids, sampling, on_progress)
    assert result is not None  # this is the first stage
    outputs = tuple(
        Output(prompt, model.tokenizer.decode(s.token_ids), tuple(s.token_ids), s.finish_reason)
        for prompt, s in zip(prompts, result.sequences, strict=True)
    )
    for output in outputs:
        display.OUT.print(display.completion(output), soft_wrap=True)
    if arguments.output is not None:
        _write(arguments.output, "".join(json.dumps(output.to_dict()) + "\n" for output in outputs))
    simulation, prompt_lens = None, [len(ids) for ids in token_ids]
    if costs is not None:
        output_lens = [len(sequence.token_ids) for sequence in result.sequences]
        simulation = planner.simulate(plan, model.spec, costs, prompt_lens, output_lens)
    predicted = plan.predicted if simulation is None else simulation.prediction
    assert predicted is not None  # there are costs, or a plan that predicts
    if not quiet:
        expected = () if simulation is None else simulation.spans
        display.OUT.print(display.comparison_table(plan, predicted, result.measured, expected, result.spans))
    if arguments.trace is not None:
        runs = {} if simulation is None else {"predicted": simulation.spans}
        _write(arguments.trace, json.dumps(tracing.trace(plan, runs | {"measured": result.spans})))
    if arguments.json_out is not None:
        Report(model.spec.name, plan.cluster, plan, predicted, result.measured, outputs).save(arguments.json_out)
    if costs is not None and simulation is not None and not arguments.no_log:
        runlog.append(runlog.RunRecord.of(plan, costs, prompt_lens, simulation, result), _log(arguments))


def _serve(arguments: Namespace, rank: Rank) -> None:
    """What a rank of torchrun but the first does: have its stage of the plan loaded, and wait for the first."""
    plan = Plan.from_dict(json.loads(rank.share(None)))
    if arguments.dry_run or rank.rank >= len(plan.stages):
        return
    model = open_model(arguments.model, arguments.load_format)
    with Engine(plan, model.checkpoint, model.spec, rank=rank) as engine:
        engine.generate([], SamplingParams())


def _share(rank: Rank, plan: Plan) -> None:
    if rank.world_size < len(plan.stages):
        raise UsageError(
            f"the plan has {len(plan.stages)} stages, but torchrun started {rank.world_size}; give it "
            f"--nproc-per-node {len(plan.stages)}"
        )
    rank.share(json.dumps(plan.to_dict()))


def _load_plan(arguments: Namespace) -> Plan:
    """The plan of --plan. Raises UsageError if other options contradict it."""
    contradicting = [option for name, option in _CONSTRAINTS.items() if hasattr(arguments, name)]
    contradicting += ["--batch-size"] * (getattr(arguments, "batch_size", None) is not None)
    if contradicting:
        raise UsageError(f"--plan decides what {', '.join(contradicting)} would; leave one of them out")
    return Plan.load(arguments.plan)


def _given_plan(arguments: Namespace) -> Plan:
    """The same, for the devices that are given, if any are."""
    plan = _load_plan(arguments)
    described = arguments.devices is not None or arguments.cluster is not None
    if described and not same_devices(_cluster(arguments), plan.cluster):
        raise UsageError(f"{arguments.plan} was made for other devices; leave out --devices and --cluster")
    return plan


def _check_room(plan: Plan, model: Model, workload: Workload, arguments: Namespace) -> None:
    """Raise UsageError if the plan is another model's, or its slots are too short for the prompts."""
    plan.check_model(model.spec)
    wanted = workload.longest_prompt + (arguments.max_new_tokens or 1)
    if wanted > plan.max_length:
        raise UsageError(
            f"the longest prompt has {workload.longest_prompt} tokens and {arguments.max_new_tokens or 1} or more "
            f"are to follow, but the plan's slots hold {plan.max_length}; make a plan for more"
        )


def _reach(plan: Plan, workload: Workload) -> Workload:
    """What costs have to cover so that a run of these prompts by a plan can be predicted."""
    longest = max(workload.longest_prompt, plan.workload.longest_prompt)
    return Workload(plan.slots, longest, max(1, plan.max_length - longest))


def as_planned(plan: Plan) -> planner.Constraints:
    """The group size of a plan's quantized units, and the activations of those on CPUs; if there is none, the usual."""
    units = ("embedding", "head", *(f"layer.{i}" for i in range(plan.num_layers)))
    quantized = [p for p in map(plan.precision, units) if p.quantized]
    if not quantized:
        return planner.Constraints()
    return planner.Constraints(
        group_size=quantized[0].group_size,
        activations=next((p.activations for p in quantized if p.activations != "a16"), "a16"),
    )


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def profile(arguments: Namespace) -> None:
    """`llmpq profile`: measure what a model's operations cost on each device, or correct what was measured by runs."""
    _check_writable(arguments.out)
    if arguments.refit is not None:
        _refit(arguments)
        return
    if arguments.log is not None:
        raise UsageError("--log is for --refit; leave it out")
    cluster = _cluster(arguments)
    with display.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        workload = _workload(arguments, model)
        costs = measured_profile(model, cluster, workload, constraints_of(arguments), notify)
    costs.save(arguments.out)
    rows = sum(len(table.rows) for table in costs.tables.values())
    display.OUT.print(f"{rows} costs of {len(costs.tables)} devices: {arguments.out}")


def _refit(arguments: Namespace) -> None:
    before = Profile.load(arguments.refit)
    records = runlog.read(_log(arguments))
    after = refit.refit(before, records)
    after.save(arguments.out)
    runs = {name: refit.runs_of(table, records) for name, table in before.tables.items()}
    errors = {
        name: (refit.mean_error(before.tables[name], of), refit.mean_error(after.tables[name], of))
        for name, of in runs.items()
    }
    counts = {name: len(of) for name, of in runs.items()}
    display.OUT.print(display.refit_table(before, after, counts, errors, refit.LEAST_RUNS))


def _log(arguments: Namespace) -> Path:
    return runlog.default_log() if arguments.log is None else Path(arguments.log)


def sensitivity(arguments: Namespace) -> None:
    """`llmpq sensitivity`: measure how much each layer minds being quantized."""
    _check_writable(arguments.out)
    with display.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        omega = measured_sensitivity(model, constraints_of(arguments).group_size, notify)
    omega.save(arguments.out)
    display.OUT.print(f"sensitivities of {len(omega.omega)} units: {arguments.out}")


def plan(arguments: Namespace) -> None:
    """`llmpq plan`: solve for layer split, bits and micro-batches."""
    _check_writable(arguments.out)
    cluster, constraints = _cluster(arguments), constraints_of(arguments)
    costs = None if arguments.costs is None else Profile.load(arguments.costs)
    omega = None if arguments.sensitivity is None else Sensitivity.load(arguments.sensitivity)
    with display.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        workload = _workload(arguments, model)
        solved, _ = make_plan(model, cluster, workload, constraints, costs=costs, omega=omega, notify=notify)
    solved.save(arguments.out)
    display.OUT.print(display.plan_table(solved))


_LENGTH = 64  # tokens of prompt and answer, if nothing is said


def _workload(arguments: Namespace, model: Model) -> Workload:
    """The workload of --prompt-len and --output-len or of --lengths, checked against the model's context."""
    if arguments.lengths is not None:
        if arguments.prompt_len is not None or arguments.output_len is not None:
            raise UsageError("--lengths says what --prompt-len and --output-len would; leave them out")

        def tokens(prompt: str, answer: str) -> tuple[int, int]:
            return len(model.tokenizer.encode_chat(prompt)), len(model.tokenizer.encode(answer))

        lengths = read_lengths(arguments.lengths, tokens, model.spec.max_positions)
        return Workload.of_lengths(arguments.batch_size, lengths)
    prompt_len, output_len = arguments.prompt_len or _LENGTH, arguments.output_len or _LENGTH
    length = prompt_len + output_len
    if length > model.spec.max_positions:
        raise UsageError(
            f"--prompt-len and --output-len add up to {length} tokens; the context of {model.spec.name} is "
            f"{model.spec.max_positions}"
        )
    return Workload(arguments.batch_size, prompt_len, output_len)


_EVALUATED_WINDOW = 512  # tokens


def evaluate(arguments: Namespace) -> None:
    """`llmpq eval`: perplexity of the weights as they are served, through the pipeline that serves them."""
    text = evaluation_text() if arguments.text is None else read_text(arguments.text)
    given = None if arguments.plan is None else _load_plan(arguments)
    model = open_model(arguments.model, arguments.load_format)
    window = min(_EVALUATED_WINDOW, model.spec.max_positions)
    if given is not None:
        given.check_model(model.spec)
        plan = _for_evaluation(given, window)
    else:
        device, constraints = Device("cpu0", "cpu", threads=os.cpu_count() or 1), constraints_of(arguments)
        precision = constraints.precision(arguments.bits).on(device.kind, constraints.activations)
        plan = Plan.single(model.spec, device, precision, slots=1, max_length=window)
    token_ids = model.tokenizer.encode(text)[: arguments.max_tokens]
    with Engine(plan, model.checkpoint, model.spec) as engine:
        result = perplexity(engine.score, token_ids, window=window)
    served = {"plan": arguments.plan} if given else {"bits": precision.bits, "activations": precision.activations}
    print(json.dumps({"model": model.spec.name, **served, **result.to_dict()}))


def _for_evaluation(plan: Plan, window: int) -> Plan:
    """The same stages and weights with one long slot, and without the caps, which were not planned for that."""
    devices = tuple(replace(device, memory_bytes=None) for device in plan.cluster.devices)
    return replace(
        plan,
        cluster=replace(plan.cluster, devices=devices),
        workload=Workload(1, max(1, window - 1), 1),
        slots=1,
        max_length=window,
        prefill_microbatch=1,
        decode_microbatch=1,
    )
