"""`llmpq eval`: quality of the weights as they are served, through the pipeline that serves them."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import add_model, read_model, read_plan
from llmpq.cli.parser import Commands, positive
from llmpq.report.progress_bar import progress
from llmpq.spec import W16, Device, Plan, Precision, Workload

_WINDOW = 512  # tokens


def add(commands: Commands) -> None:
    parser = commands.add_command("eval", execute, "quality of the weights as they are served, as JSON")
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", help="plain text (default: built in)")
    parser.add_argument(
        "--max-tokens", type=positive, default=4096, metavar="N", help="of the text, at most (default: 4096)"
    )
    parser.add_argument(
        "--perplexity-only", action="store_true", help="leave out the comparison with the model in 16 bits"
    )
    weights = parser.add_argument_group("weights (default: 16 bit)")
    weights.add_argument("--plan", metavar="FILE", help="those of this plan, in its own pipeline")
    add_constraints(weights, only=("fixed_bits", "group_size", "quantizer", "activations"))


def execute(arguments: Namespace) -> None:
    from llmpq.checkpoint.weights import open_weights
    from llmpq.measure.divergence import measure_divergence
    from llmpq.measure.perplexity import cut, measure_perplexity
    from llmpq.measure.quantized_model import as_served
    from llmpq.measure.reference_model import ReferenceModel
    from llmpq.measure.text import digest, evaluation_text, read_text
    from llmpq.runtime.engine import Engine

    text = evaluation_text() if arguments.text is None else read_text(arguments.text)
    given = None if arguments.plan is None else read_plan(arguments)[0]
    with progress() as notify:
        model = read_model(arguments, notify)
        window = min(_WINDOW, model.spec.max_positions)
        if given is not None:
            given.check_model(model.spec)
            plan, served = _for_evaluation(given, window), {"plan": arguments.plan}
        else:
            device, constraints = Device("cpu0", "cpu", threads=os.cpu_count() or 1), read_constraints(arguments)
            option = constraints.option(constraints.fixed_bits or 16)
            mode = constraints.activations if option.quantized else "a16"
            plan = Plan.single(model.spec, device, option, slots=1, max_length=window, activations=mode)
            served = {"bits": option.width if isinstance(option, Precision) else str(option), "activations": mode}
        token_ids = model.tokenizer.encode(text)[: arguments.max_tokens]
        exact = all(plan.precision(unit) == W16 for unit in model.spec.units)
        found: dict[str, Any]
        weights, plan = as_served(model, plan, notify)
        if exact or arguments.perplexity_only:
            with Engine(plan, weights.checkpoint, weights.spec, notify=notify) as engine:
                notify(f"scoring {len(token_ids)} tokens")
                found = measure_perplexity(engine.score, token_ids, window).to_dict()
        else:
            source = open_weights(model.checkpoint, model.spec)
            reference = ReferenceModel(model.spec, source, cut(token_ids, window), notify)
            with Engine(plan, weights.checkpoint, weights.spec, logits=True, notify=notify) as engine:
                perplexity, divergence = measure_divergence(engine.logits, reference, notify)
            found = perplexity.to_dict() | divergence.to_dict()
    print(json.dumps({"model": model.spec.name, **served, "text": digest(text), **found}))


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
