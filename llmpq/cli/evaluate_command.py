"""`llmpq eval`: quality of the weights as they are served, through the pipeline that serves them."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from llmpq.checkpoint.model_files import Model, open_model
from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import add_model, read_model, read_plan
from llmpq.cli.parser import Commands, Parser, positive
from llmpq.progress import Notify, silent
from llmpq.report.progress_bar import progress
from llmpq.spec import W16, Device, Plan, UsageError


def add(commands: Commands) -> None:
    parser = commands.add_command("eval", execute, "quality of the weights as they are served, as JSON")
    add_served(parser)
    parser.add_argument("--text", metavar="FILE", help="plain text (default: built in)")
    parser.add_argument(
        "--max-tokens", type=positive, default=4096, metavar="N", help="of the text, from all over it (default: 4096)"
    )
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--reference", metavar="M", help="compare with this model in 16 bits (default: the same, if it is quantized)"
    )
    compared.add_argument("--perplexity-only", action="store_true", help="compare with none")


def add_served(parser: Parser) -> None:
    """The options that say whose quality is measured."""
    add_model(parser)
    weights = parser.add_argument_group("weights (default: 16 bit)")
    weights.add_argument("--plan", metavar="FILE", help="those of this plan, in its own pipeline")
    add_constraints(weights, only=("fixed_bits", "group_size", "quantizer", "activations", "kv_bits"))


def read_served(arguments: Namespace, notify: Notify = silent) -> tuple[Model, Plan]:
    """The model, and the given plan, or one of a single CPU stage, to be resized. Raises UsageError."""
    from llmpq.host_limits import usable_cores

    given = None if arguments.plan is None else read_plan(arguments)[0]
    model = read_model(arguments, notify)
    if given is not None:
        given.check_model(model.spec)
        return model, given
    device, constraints = Device("cpu0", "cpu", threads=usable_cores()), read_constraints(arguments)
    option = constraints.option(constraints.fixed_bits or 16)
    mode = constraints.activations if option.quantized else "a16"
    if len(constraints.kv_bits) > 1:
        raise UsageError("--kv-bits auto leaves open what is measured; give 16 or 8")
    (kv_bits,) = constraints.kv_bits
    return model, Plan.single(model.spec, device, option, slots=1, max_length=1, activations=mode, kv_bits=kv_bits)


def execute(arguments: Namespace) -> None:
    from llmpq.checkpoint.weights import open_weights
    from llmpq.measure.divergence import measure_divergence
    from llmpq.measure.perplexity import WINDOW, measure_perplexity, windows_of
    from llmpq.measure.quantized_model import as_served
    from llmpq.measure.reference_model import ReferenceModel
    from llmpq.measure.text import digest, evaluation_text, read_text
    from llmpq.runtime.engine import Engine

    text = evaluation_text() if arguments.text is None else read_text(arguments.text)
    with progress() as notify:
        model, plan = read_served(arguments, notify)
        window = min(WINDOW, model.spec.max_positions)
        plan = plan.resized(1, window)
        windows = windows_of(model.tokenizer.encode(text), window, arguments.max_tokens)
        compared = _reference(arguments, model, plan)
        found: dict[str, Any]
        weights, plan = as_served(model, plan, notify)
        if compared is None:
            with Engine(plan, weights.checkpoint, weights.spec, notify=notify) as engine:
                notify(f"scoring {sum(map(len, windows))} tokens")
                found = measure_perplexity(engine.score, windows).to_dict()
        else:
            source = open_weights(compared.checkpoint, compared.spec)
            reference = ReferenceModel(compared.spec, source, windows, notify)
            with Engine(plan, weights.checkpoint, weights.spec, logits=True, notify=notify) as engine:
                perplexity, divergence = measure_divergence(engine.logits, reference, notify)
            found = perplexity.to_dict() | divergence.to_dict()
    if arguments.plan is None:
        width = plan.head.precision.width
        served = {
            "bits": width if isinstance(width, int) else str(width),
            "activations": plan.stages[0].activations,
            "kv_bits": plan.kv_bits,
        }
    else:
        served = {"plan": arguments.plan}
    print(json.dumps({"model": model.spec.name, **served, "text": digest(text), **found}))


def _reference(arguments: Namespace, model: Model, plan: Plan) -> Model | None:
    """What is compared with, if anything. Raises UsageError if there is nothing to, or that has other tokens."""
    if arguments.reference is None:
        exact = plan.kv_bits == 16 and all(plan.precision(unit) == W16 for unit in model.spec.units)
        if exact or arguments.perplexity_only:
            return None
        if model.spec.source_hash:
            raise UsageError(
                f"{model.spec.name} is quantized, so there is no model in 16 bits to compare with; name the one that "
                "it was made from with --reference, or ask for --perplexity-only"
            )
        return model
    reference = open_model(arguments.reference)
    if reference.spec.vocab_size != model.spec.vocab_size:
        raise UsageError(
            f"{reference.spec.name} has {reference.spec.vocab_size} tokens and {model.spec.name} "
            f"{model.spec.vocab_size}; --reference takes the model that this one was made from"
        )
    return reference
