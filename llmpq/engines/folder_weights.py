"""The weights for engines that read folders of transformers: the model as it is, or quantized to the GPTQ form.

The GPTQ form that llmpq writes has one width for all layers (llmpq/checkpoint/gptq_form.py says what of it engines
read). So a plan of several widths gets the widest that takes no more than the plan, and embedding and head get 16 bits.
vLLM also reads GPTQModel's `dynamic` rules, which give modules widths of their own; llmpq does not write them yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmpq.checkpoint.gptq_form import BITS, GROUP_SIZES, GptqForm, gptq_options
from llmpq.engines.export import Job
from llmpq.spec import W16, Native, Precision, UnitPrecision, UsageError
from llmpq.spec.formatting import format_bytes, format_widths

FOLDER = "weights"  # that is made, beside the files of an export


@dataclass(frozen=True)
class Weights:
    model: str  # a hub id or folder, for the engine
    commands: tuple[tuple[str, ...], ...]  # that make it first
    options: Mapping[str, UnitPrecision]  # of each unit
    lost: tuple[str, ...]


def stored_weights(job: Job) -> Weights:
    """The model as it is: as the plan has it where that is native or 16 bits, else wider. Raises UsageError."""
    spec, plan = job.spec, job.plan
    if spec.source_hash:
        raise job.refuse(f"{spec.name} is in llmpq's own form; export the model that it was quantized from")
    if job.model.checkpoint.is_gguf:
        raise job.refuse(f"{spec.name} is a GGUF file, and {job.engine} wants a folder with safetensors for this")
    as_stored: UnitPrecision = Native() if spec.stored else W16
    options = dict.fromkeys(spec.units, as_stored)
    narrower = [unit for unit in spec.units if plan.precision(unit).quantized and plan.precision(unit) != as_stored]
    lost = [f"the plan's bits ({_bits(job)}): all weights are as {spec.name} stores them"] if narrower else []
    return Weights(job.name, (), options, tuple(lost))


def gptq_weights(job: Job) -> Weights:
    """Layers of 4 or 8 bits if the plan's are quantized, else the model as it is. Raises UsageError."""
    spec, plan = job.spec, job.plan
    layers = [unit for unit in spec.units if unit.startswith("layer.")]
    options = (of for unit in layers for of in spec.linear_options(unit, plan.precision(unit)).values())
    native = [isinstance(of, Native) for of in options]
    if not any(plan.precision(unit).quantized for unit in layers) or (all(native) and not job.model.checkpoint.is_gguf):
        return stored_weights(job)
    if spec.source_hash or (spec.stored and not job.model.checkpoint.is_gguf):
        raise job.refuse(
            f"it quantizes {spec.name}, which is quantized already; export the model that it was made from"
        )
    mean = _mean_bits(job, layers)
    width = max([bits for bits in BITS if bits <= mean], default=min(BITS))
    option = _fitting(job, width)
    lost = []
    if len({plan.precision(unit) for unit in layers}) > 1 or mean != width:
        lost.append(f"bits of each layer ({_bits(job)}): all layers have {width}, as llmpq writes the GPTQ form")
    tables = [unit for unit in ("embedding", "head") if plan.precision(unit).quantized]
    if tables:
        lost.append(f"the bits of {' and '.join(tables)}: 16 in the GPTQ form")
    if any(native):
        lost.append(f"the codes of {spec.name}: its weights are rounded anew")
    if any(precision.zero != "sym" or precision.group_size != option.group_size for precision in _precisions(job)):
        lost.append(f"groups and zero points: {option}, as the GPTQ form has them")
    group = "row" if option.group_size is None else str(option.group_size)
    made = ("--bits", str(width), "--group-size", group, "--quantizer", option.quantizer, "--format", "gptq")
    command = ("llmpq", "quantize", "--model", job.name, *made, "--out", FOLDER)
    return Weights(FOLDER, (command,), gptq_options(spec, option), tuple(lost))


def check_weights_fit(job: Job, weights: Weights) -> None:
    """Raise UsageError if a stage's weights alone are more than its device's cap."""
    spec, options = job.spec, weights.options
    for i, (_, device) in enumerate(job.stages):
        size = sum(spec.unit_bytes(unit, options[unit]) for unit in job.plan.units_of(i))
        if spec.tied_embeddings and len(job.stages) == 1:
            size -= spec.table.weight_bytes(W16)  # it is there once
        if device.memory_bytes is not None and size > device.memory_bytes:
            needed, cap = format_bytes(size), format_bytes(device.memory_bytes)
            form = (
                "llmpq writes the GPTQ form with one width for all layers and 16 bits for the tables"
                if weights.commands
                else "they are as the model stores them"
            )
            raise job.refuse(
                f"its weights would take {needed} on {device.name}, which has {cap}; {form}, so plan with such "
                "(--bits, --unit-bits)"
            )


def _fitting(job: Job, width: int) -> Precision:
    """With the group size of most of the plan's linears where the GPTQ form has it, else the nearest that fits."""
    found = Counter(precision.group_size for precision in _precisions(job))
    wanted = found.most_common(1)[0][0]
    quantizer = "gptq" if any(precision.quantizer == "gptq" for precision in _precisions(job)) else "rtn"
    sizes = sorted(GROUP_SIZES, key=lambda size: (size != wanted, size is None, abs((size or 0) - (wanted or 0))))
    problem = None
    for size in sizes:
        option = Precision(width, size, quantizer=quantizer)
        try:
            GptqForm(job.spec, job.family, gptq_options(job.spec, option))
            return option
        except UsageError as error:
            problem = problem or error
    raise job.refuse(f"{problem}")


def _precisions(job: Job) -> list[Precision]:
    """Of all linears of all layers that the plan quantizes."""
    spec, plan = job.spec, job.plan
    units = (unit for unit in spec.units if unit.startswith("layer."))
    return [p for unit in units for p in spec.linear_precisions(unit, plan.precision(unit)).values() if p.quantized]


def _mean_bits(job: Job, layers: list[str]) -> float:
    spec, plan = job.spec, job.plan
    sizes = {unit: sum(linear.weights for linear in spec.linears(unit).values()) for unit in layers}
    return sum(size * spec.bits(unit, plan.precision(unit)) for unit, size in sizes.items()) / sum(sizes.values())


def _bits(job: Job) -> str:
    return format_widths(width for stage in job.plan.stages for width in stage.widths)
