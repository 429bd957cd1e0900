"""`llmpq run`: plan, load, generate, and say how far the prediction was off."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import planner
from llmpq import demo
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.cli.arguments import constraints_of_plan, load_plan, read_cluster, read_constraints, run_log_path
from llmpq.cli.output_files import check_writable, write_text
from llmpq.cli.prompts import is_text, read_prompts
from llmpq.hardware import same_devices
from llmpq.report import chrome_trace, console
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.torchrun import Rank
from llmpq.spec import InvalidField, Output, Plan, Profile, Report, UsageError, Workload
from llmpq.tuning import run_log
from llmpq.workflow import make_plan, measured_profile, workload_of


def run(arguments: Namespace) -> None:
    """`llmpq run`: plan, load, generate, and compare what was predicted with what was measured."""
    rank = Rank.current()
    if rank is not None and not rank.first:
        _serve(arguments, rank)
        return
    check_writable(arguments.output, arguments.json_out, arguments.trace)
    log = None if arguments.no_log or arguments.dry_run else run_log_path(arguments)
    check_writable(log, instead="name another --log, or --no-log")
    sampling = _sampling(arguments)
    given = None if arguments.plan is None else _given_plan(arguments)
    cluster, constraints = read_cluster(arguments), read_constraints(arguments)
    if arguments.devices is None and arguments.cluster is None:
        constraints = replace(constraints, all_devices=True)  # the demo's devices are there to show a pipeline
    costs = None if arguments.costs is None else Profile.load(arguments.costs)
    prompts = _prompts(arguments)
    quiet = arguments.quiet
    with console.status(quiet) as notify:
        notify("opening the model")
        model = open_model(arguments.model, arguments.load_format)
        token_ids = [model.tokenizer.encode_chat(prompt) for prompt in prompts]
        workload = workload_of(model.spec, token_ids, sampling.max_tokens, arguments.batch_size)
        if given is not None:
            plan = given
            _check_room(plan, model, workload, arguments)
            local = all(device.host == "localhost" for device in plan.cluster.devices)
            if costs is None and local and not arguments.dry_run:
                costs = measured_profile(model, plan.cluster, _reach(plan, workload), constraints_of_plan(plan), notify)
            if costs is None and plan.predicted is None:
                raise UsageError(f"{arguments.plan} predicts nothing; give --costs from `llmpq profile`")
        else:
            plan, costs = make_plan(model, cluster, workload, constraints, costs=costs, notify=notify)
        if rank is not None:
            _share(rank, plan)
    if not quiet:
        console.OUT.print(console.plan_table(plan))
    if arguments.dry_run:
        return
    with console.status(quiet) as notify:
        notify("loading the stages")
        engine = Engine(plan, model.checkpoint, model.spec, rank=rank, on_load=lambda stage: notify(f"loaded {stage}"))
    with engine, console.progress(quiet, len(prompts) * sampling.max_tokens) as on_progress:
        result = engine.generate(token_ids, sampling, on_progress)
    assert result is not None  # this is the first stage
    outputs = tuple(
        Output(prompt, model.tokenizer.decode(s.token_ids), tuple(s.token_ids), s.finish_reason)
        for prompt, s in zip(prompts, result.sequences, strict=True)
    )
    for output in outputs:
        console.OUT.print(console.completion(output), soft_wrap=True)
    if arguments.output is not None:
        write_text(arguments.output, "".join(json.dumps(output.to_dict()) + "\n" for output in outputs))
    simulation, prompt_lens = None, [len(ids) for ids in token_ids]
    if costs is not None:
        output_lens = [len(sequence.token_ids) for sequence in result.sequences]
        simulation = planner.simulate(plan, model.spec, costs, prompt_lens, output_lens)
    predicted = plan.predicted if simulation is None else simulation.prediction
    assert predicted is not None  # there are costs, or a plan that predicts
    if not quiet:
        expected = () if simulation is None else simulation.spans
        console.OUT.print(console.comparison_table(plan, predicted, result.measured, expected, result.spans))
    if arguments.trace is not None:
        runs = {} if simulation is None else {"predicted": simulation.spans}
        write_text(arguments.trace, json.dumps(chrome_trace.trace(plan, runs | {"measured": result.spans})))
    if arguments.json_out is not None:
        Report(model.spec.name, plan.cluster, plan, predicted, result.measured, outputs).save(arguments.json_out)
    if costs is not None and simulation is not None and log is not None:
        run_log.append(run_log.RunRecord.of(plan, costs, prompt_lens, simulation, result), log)


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
        if not is_text(prompt):
            raise UsageError(f"prompt {i} is not UTF-8 text")
    return prompts


def _given_plan(arguments: Namespace) -> Plan:
    """The plan of --plan. Raises UsageError if devices are described beside it that are not the plan's."""
    plan = load_plan(arguments)
    described = arguments.devices is not None or arguments.cluster is not None
    if described and not same_devices(read_cluster(arguments), plan.cluster):
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
