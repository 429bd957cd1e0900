"""What each command does, from parsed arguments to files and text. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import planner
from llmpq import demo, display
from llmpq.kernels import cpu
from llmpq.measure.perplexity import perplexity
from llmpq.measure.text import evaluation_text, read_text
from llmpq.planning import (
    Model,
    Notify,
    make_plan,
    measured_profile,
    measured_sensitivity,
    open_model,
    with_memory,
    workload_of,
)
from llmpq.prompts import read_prompts
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.torchrun import Rank
from llmpq.spec import (
    W16,
    Cluster,
    Device,
    InvalidField,
    Output,
    Plan,
    Precision,
    Profile,
    Report,
    Sensitivity,
    UsageError,
    Workload,
    parse_devices,
)

_OUT = Console(highlight=False)
_ERR = Console(stderr=True, highlight=False)


@contextmanager
def _status(quiet: bool) -> Iterator[Notify]:
    """A line on stderr that says what is going on; nothing when quiet."""
    if quiet:
        yield lambda _: None
        return
    with _ERR.status("starting") as status:

        def notify(text: str) -> None:
            status.update(text)
            if not _ERR.is_terminal:
                _ERR.print(f"{text} ...")

        yield notify


def _check_writable(*paths: str | None) -> None:
    """Refuse output files that cannot be written before minutes of work are spent on their content."""
    for path in filter(None, paths):
        folder = Path(path).absolute().parent
        if not os.access(folder, os.W_OK) or Path(path).is_dir():
            raise UsageError(f"cannot write {path}: {folder} is not a folder that can be written to")


def _cluster(arguments: Namespace) -> Cluster:
    if arguments.devices:
        return parse_devices(arguments.devices)
    if arguments.cluster:
        return Cluster.load(arguments.cluster)
    return demo.cluster(cpu.isa())


def _constraints(arguments: Namespace) -> planner.Constraints:
    if arguments.bits and arguments.bits < arguments.min_bits:
        raise UsageError(f"--bits {arguments.bits} is below --min-bits {arguments.min_bits}")
    if arguments.theta < 0:
        raise UsageError(f"--theta {arguments.theta:g} is negative; it is what a unit of sensitivity costs in seconds")
    return planner.Constraints(
        group_size=arguments.group_size,
        min_bits=arguments.min_bits,
        fixed_bits=arguments.bits,
        all_devices=arguments.all_devices,
        theta=arguments.theta,
    )


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
    if arguments.prompts:
        prompts = read_prompts(arguments.prompts) + list(arguments.prompt or ())
    else:
        prompts = list(arguments.prompt or demo.PROMPTS)
    for i, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UsageError(f"prompt {i} is empty")
    return prompts


@contextmanager
def _progress(quiet: bool, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar of generated tokens on stderr; the block's value is called with the number generated so far."""
    if quiet:
        yield None
        return
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=_ERR) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
        bar.update(task, total=bar.tasks[0].completed)


def _write_jsonl(path: str, outputs: Sequence[Output]) -> None:
    Path(path).write_text("".join(json.dumps(output.to_dict()) + "\n" for output in outputs))


def run(arguments: Namespace) -> None:
    """`llmpq run`: plan, load, generate, and compare what was predicted with what was measured."""
    _check_writable(arguments.output, arguments.json_out)
    prompts = _prompts(arguments)
    sampling = _sampling(arguments)
    rank = Rank.current()
    quiet = arguments.quiet or (rank is not None and not rank.first)
    with _status(quiet) as notify:
        notify("opening the model")
        model = open_model(arguments.model, arguments.load_format)
        token_ids = [model.tokenizer.encode_chat(prompt) for prompt in prompts]
        workload = workload_of(model.spec, token_ids, sampling.max_tokens, arguments.batch_size)

        if rank is not None and not rank.first:
            plan = Plan.from_dict(json.loads(rank.share(None)))
        else:
            if arguments.plan:
                plan = _given_plan(arguments, model, workload)
                costs = measured_profile(model, plan.cluster, plan.workload, _group_size(plan), notify)
            else:
                plan, costs = make_plan(model, _cluster(arguments), workload, _constraints(arguments), notify=notify)
            if rank is not None:
                _check_ranks(rank, plan)
                rank.share(json.dumps(plan.to_dict()))
    if not quiet:
        _OUT.print(display.plan_table(plan))
    if arguments.dry_run:
        return
    if rank is not None and rank.rank >= len(plan.stages):
        return  # the plan has no stage for this rank
    with _status(quiet) as notify:
        notify("loading the stages")
        engine = Engine(plan, model.checkpoint, model.spec, rank=rank, on_load=lambda stage: notify(f"loaded {stage}"))
    with engine, _progress(quiet, len(prompts) * sampling.max_tokens) as on_progress:
        result = engine.generate(token_ids, sampling, on_progress)
    if result is None:
        return  # only the first stage has the results
    outputs = tuple(
        Output(prompt, model.tokenizer.decode(s.token_ids), tuple(s.token_ids), s.finish_reason)
        for prompt, s in zip(prompts, result.sequences, strict=True)
    )
    predicted = planner.predict(
        plan, model.spec, costs, [len(ids) for ids in token_ids], [len(output.token_ids) for output in outputs]
    )
    report = Report(model.spec.name, plan.cluster, plan, predicted, result.measured, outputs)
    if arguments.output:
        _write_jsonl(arguments.output, outputs)
    if arguments.json_out:
        report.save(arguments.json_out)
    for output in outputs:
        _OUT.print(display.completion(output), soft_wrap=True)
    if not arguments.quiet:
        _OUT.print(display.comparison_table(plan, predicted, result.measured))


def _check_ranks(rank: Rank, plan: Plan) -> None:
    if rank.world_size < len(plan.stages):
        raise UsageError(
            f"the plan has {len(plan.stages)} stages, but torchrun started {rank.world_size}; give it "
            f"--nproc-per-node {len(plan.stages)}"
        )


def _given_plan(arguments: Namespace, model: Model, workload: Workload) -> Plan:
    """The plan of --plan, after checking that it is one for this model, these devices and these prompts."""
    plan = Plan.load(arguments.plan)
    plan.check_model(model.spec)
    if (arguments.devices or arguments.cluster) and with_memory(_cluster(arguments)) != plan.cluster:
        raise UsageError(f"{arguments.plan} was made for other devices; leave out --devices and --cluster")
    if workload.longest_prompt >= plan.max_length:
        raise UsageError(
            f"a prompt has {workload.longest_prompt} tokens, but the plan's slots hold {plan.max_length}; make a plan "
            "for longer prompts"
        )
    return plan


def _group_size(plan: Plan) -> int | None:
    """The group size of the plan's quantized units."""
    units = ("embedding", "head", *(f"layer.{i}" for i in range(plan.num_layers)))
    return next((p.group_size for p in map(plan.precision, units) if p.quantized), None)


def profile(arguments: Namespace) -> None:
    """`llmpq profile`: measure what a model's operations cost on each device."""
    _check_writable(arguments.out)
    with _status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        workload = _workload(arguments, model)
        costs = measured_profile(model, _cluster(arguments), workload, arguments.group_size, notify)
    costs.save(arguments.out)
    rows = sum(len(table.rows) for table in costs.tables.values())
    _OUT.print(f"{rows} costs of {len(costs.tables)} devices: {arguments.out}")


def sensitivity(arguments: Namespace) -> None:
    """`llmpq sensitivity`: measure how much each layer minds being quantized."""
    _check_writable(arguments.out)
    with _status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        omega = measured_sensitivity(model, arguments.group_size, notify)
    omega.save(arguments.out)
    _OUT.print(f"sensitivities of {len(omega.omega)} units: {arguments.out}")


def plan(arguments: Namespace) -> None:
    """`llmpq plan`: solve for layer split, bits and micro-batches."""
    _check_writable(arguments.out)
    costs = Profile.load(arguments.costs) if arguments.costs else None
    omega = Sensitivity.load(arguments.sensitivity) if arguments.sensitivity else None
    with _status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        solved, _ = make_plan(
            model,
            _cluster(arguments),
            _workload(arguments, model),
            _constraints(arguments),
            costs=costs,
            omega=omega,
            notify=notify,
        )
    solved.save(arguments.out)
    _OUT.print(display.plan_table(solved))


def _workload(arguments: Namespace, model: Model) -> Workload:
    """The workload of --prompt-len, --output-len and --batch-size, checked against the model's context."""
    length = arguments.prompt_len + arguments.output_len
    if length > model.spec.max_positions:
        raise UsageError(
            f"--prompt-len and --output-len add up to {length} tokens; the context of {model.spec.name} is "
            f"{model.spec.max_positions}"
        )
    return Workload(arguments.batch_size, arguments.prompt_len, arguments.output_len)


def evaluate(arguments: Namespace) -> None:
    """`llmpq eval`: perplexity of the weights as they are served, through the pipeline that serves them."""
    text = read_text(arguments.text) if arguments.text else evaluation_text()
    model = open_model(arguments.model, arguments.load_format)
    window = min(512, model.spec.max_positions)
    if arguments.plan:
        plan = Plan.load(arguments.plan)
        plan.check_model(model.spec)
        window = min(window, plan.max_length)
    else:
        precision = W16 if arguments.bits == 16 else Precision(arguments.bits, arguments.group_size)
        device = Device("cpu0", "cpu", threads=os.cpu_count() or 1)
        plan = Plan.single(model.spec, device, precision, slots=1, max_length=window)
    token_ids = model.tokenizer.encode(text)[: arguments.max_tokens]
    with Engine(plan, model.checkpoint, model.spec) as engine:
        result = perplexity(engine.score, token_ids, window=window)
    served = {"plan": arguments.plan} if arguments.plan else {"bits": arguments.bits}
    print(json.dumps({"model": model.spec.name, **served, **result.to_dict()}))
