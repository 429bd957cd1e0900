"""A model quantized as a plan says, in a folder that loads as any other model: made once, served bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from llmpq.cache import find, keep
from llmpq.checkpoint.configuration import family_of_config
from llmpq.checkpoint.gptq_form import GptqForm
from llmpq.checkpoint.model_files import Checkpoint, Model, describe, load_model
from llmpq.checkpoint.packed_folder import Precisions
from llmpq.checkpoint.packed_writer import Form, PackedForm, PackedWriter
from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.checkpoint.weights import WeightSource, floating, is_finite, open_weights
from llmpq.measure import calibrated_layer, calibrated_weights, calibration_pass, expert_inputs, fitted_weights
from llmpq.measure import text as texts
from llmpq.measure.fitted_weights import needs_text, shares_table
from llmpq.measure.text import calibration_text, digest
from llmpq.models.quantized_cache import quantizer_version
from llmpq.progress import Notify, silent
from llmpq.spec import ModelSpec, Plan, UnitPrecision, UsageError

Options = Mapping[str, UnitPrecision]  # of every unit
_DECIDING = (calibrated_layer, calibrated_weights, calibration_pass, expert_inputs, fitted_weights, texts)  # weights
FormName = Literal["llmpq", "gptq"]


def write_quantized(
    model: Model,
    options: Options,
    folder: Path,
    *,
    text: str | None = None,
    form: FormName = "llmpq",
    notify: Notify = silent,
) -> None:
    """Quantize a model, unit by unit, into a folder, which a later `open_model` loads bit for bit.

    In the form "gptq" it is for other programs (checkpoint/gptq_form.py). `text` is what the model reads meanwhile, if
    a quantizer asks for that: calibration_text() by default. Units that an earlier call with the same arguments has
    written are not done again. Raises UsageError; OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec, described = model.spec, describe(model.checkpoint)
    text = calibration_text() if text is None else text
    precisions = _precisions(spec, options)
    source = open_weights(model.checkpoint, spec)
    theirs = family_of_config(described.config)  # a GGUF file's own has its tensors in another form
    made: Form = PackedForm(spec, precisions) if form == "llmpq" else GptqForm(spec, theirs, options)
    written = PackedWriter(folder, f"{form} {_key(spec, precisions, text)}", made)
    if written.holds_another:
        raise UsageError(f"{folder} holds a model of other weights; choose another folder, or remove it first")
    tokenizer = model.tokenizer  # read before the work, so that what is wrong with it is said before
    token_ids = tokenizer.encode(text) if needs_text(spec, options) else []
    parts, shared = decoder_tensors(spec, described.family), shares_table(spec, options)
    in_turn = calibrated_weights.quantized_in_turn(spec, source, options, token_ids, written.read, notify)
    if all(written.read(unit) is not None for unit in spec.units):
        in_turn = iter(())  # the text is not read for nothing
    for unit, weights in in_turn:
        others = [part for of, part in parts if of == unit and part.removesuffix(".weight") not in weights]
        if unit == "head" and shared:
            others, weights = [part for part in others if part != "table.weight"], {}
        if written.read(unit) is None:
            written.write(unit, weights, {part: _plain(source, unit, part, spec) for part in others})
    tokenizer.save(folder)
    tied = described.family.config["tied_embeddings"].names[0]
    written.finish({**described.config, tied: shared})


def as_served(model: Model, plan: Plan, notify: Notify = silent) -> tuple[Model, Plan]:
    """The model whose stored weights are those of a plan, and the plan for it.

    Where a quantizer needs to read a text, it is quantized ahead, into the cache; else workers do it as they load.
    Raises UsageError, also for a plan of another model, and if there is no cache that can be written.
    """
    spec = model.spec
    plan.check_model(spec)
    options = {unit: plan.precision(unit) for unit in spec.units}
    if not needs_text(spec, options):
        return model, plan

    def opened(folder: Path) -> Model:
        return load_model(Checkpoint(model.checkpoint.name, folder, "safetensors"))

    key = _key(spec, _precisions(spec, options), calibration_text())
    found = find("models", key, opened)
    if found is None:
        keep("models", key, lambda folder: write_quantized(model, options, folder, notify=notify))
        found = find("models", key, opened)
    if found is None:
        raise UsageError(
            "there is no cache that can be written, which the quantized model goes to; set LLMPQ_CACHE to a folder, or "
            "write the model yourself with `llmpq quantize`"
        )
    return found, replace(plan, model_hash=found.spec.content_hash)


def _precisions(spec: ModelSpec, options: Options) -> Precisions:
    """Of all linears that are quantized; a table that is shared is the embedding's."""
    found = {
        unit: {name: p for name, p in spec.linear_precisions(unit, options[unit]).items() if p.quantized}
        for unit in spec.units
    }
    if shares_table(spec, options):
        del found["head"]
    return {unit: of for unit, of in found.items() if of}


def _key(spec: ModelSpec, precisions: Precisions, text: str) -> str:
    """Names all that the weights depend on."""
    names = {unit: {name: str(p) for name, p in of.items()} for unit, of in precisions.items()}
    versions = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in _DECIDING]
    everything = json.dumps([spec.content_hash, names, digest(text), quantizer_version(), *versions], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:24]


def _plain(source: WeightSource, unit: str, part: str, spec: ModelSpec) -> torch.Tensor:
    """A part that is not quantized: matrices in the model's own type, vectors as they are stored."""
    rows = torch.cat([floating(portion) for portion in source.rows(unit, part)])
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if rows.dim() == 1 or rows.dtype == dtype:
        return rows
    narrow = rows.to(dtype)
    if not is_finite(narrow):
        raise UsageError(f"{spec.name}: {unit}.{part} holds numbers too large for {spec.dtype}")
    return narrow
