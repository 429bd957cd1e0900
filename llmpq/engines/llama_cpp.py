"""llama.cpp: one process; its CPU has the first layers, its GPUs the rest in the order of --device.

-ngl counts layers from the end, the head among them; --tensor-split divides those by proportions. With the numbers of
layers as proportions each GPU gets exactly these: layer i of n is on the first device whose share, summed up, is more
than i / n (load_tensors in src/llama-model.cpp). The table of the embedding is always on the CPU. Flags are in
docs/multi-gpu.md and tools/server/README.md.

llama-quantize (tools/quantize/README.md): --tensor-type takes a regular expression that is searched in the names of
tensors (src/llama-quant.cpp), --token-embedding-type and --output-tensor-type the tables. K types have blocks of 256
along k; where k is no multiple, a type with blocks of 32 is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import gguf

from llmpq.checkpoint.gguf_forms import FORMS, GgufForm, gguf_form
from llmpq.checkpoint.gguf_header import read_gguf
from llmpq.checkpoint.tensor_index import Index
from llmpq.engines.export import Expanded, Export, Job, layer_count, shell_script
from llmpq.engines.losses import cache_dtypes, common_losses, microbatch_loss
from llmpq.spec import Native, Precision

_CACHE_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "int8": "q8_0"}
_SUPERBLOCK, _BLOCK = 256, 32  # codes along k
_FLOATING = ("F32", "F16", "BF16")
_CONVERTER = Expanded('"${LLAMA_CPP:?set it to the full path of the source of llama.cpp}/convert_hf_to_gguf.py"')


def for_llama_cpp(job: Job) -> Export:
    """For llama-quantize and llama-server. Raises UsageError."""
    job.check_one_host()
    job.check_own_gpus()
    gpus = [(stage, device) for stage, device in job.stages if device.kind == "cuda"]
    behind = [device.name for _, device in job.stages[: len(job.stages) - len(gpus)] if device.kind == "cuda"]
    if behind:
        raise job.refuse(
            f"a CPU comes after {', '.join(behind)}, and llama.cpp's CPU has the first layers; plan with --pin layer.0="
            "the CPU, or --without it"
        )
    commands, file, lost = _Quantization(job).result()
    script = {"serve.sh": shell_script([_server(job, file)])}
    if commands:
        script = {"quantize.sh": shell_script(commands), **script}
    return Export(script, (*lost, *_losses(job, gpus != []), *common_losses(job)))


def _server(job: Job, file: str) -> list[str]:
    plan = job.plan
    cpus = [device for _, device in job.stages if device.kind == "cpu"]
    layers = {device: layer_count(stage) for stage, device in job.stages if device.kind == "cuda"}
    if layers:
        last = job.stages[-1][1]
        layers[last] += 1  # the head
    used = {device: count for device, count in layers.items() if count}
    words = ["llama-server", "-m", file, "-ngl", str(sum(used.values()))]
    if used:
        words += ["--split-mode", "layer", "--device", ",".join(f"CUDA{device.index}" for device in used)]
        words += ["--tensor-split", ",".join(map(str, used.values()))]
    else:
        words += ["--device", "none"]
    if cpus:
        words += ["-t", str(sum(device.threads for device in cpus))]
    cache = _CACHE_TYPES[cache_dtypes(job)[0]]
    words += ["-c", str(plan.slots * plan.max_length), "-np", str(plan.slots)]
    if cache == "q8_0":  # values in such a type need it
        words += ["-fa", "on"]
    return [*words, "-ctk", cache, "-ctv", cache]


def _losses(job: Job, on_gpus: bool) -> list[str]:
    lost = [microbatch_loss(job, "llama.cpp cuts batches by tokens (-b, -ub)")]
    cpus = [device.name for _, device in job.stages if device.kind == "cpu"]
    if len(cpus) > 1:
        lost.append(f"stages on {', '.join(cpus)}: to llama.cpp they are one CPU, which computes their layers in turn")
    if on_gpus and job.stages[0][1].kind == "cuda":
        lost.append(f"the embedding on {job.stages[0][1].name}: llama.cpp keeps it on the CPU")
    skipped = [device.name for stage, device in job.stages[:-1] if device.kind == "cuda" and not layer_count(stage)]
    if skipped:
        lost.append(f"{', '.join(skipped)}: without a layer there is nothing for it to do in llama.cpp")
    caches = cache_dtypes(job)
    if len(caches) > 1:
        lost.append(f"keys and values in {' and '.join(caches)}: llama.cpp has one type for all, {caches[0]}")
    if "int8" in caches[:1]:
        lost.append(f"a scale of keys and of values for each head and token: q8_0 has one for {_BLOCK} numbers")
    return lost


class _Quantization:
    """What makes the GGUF file of a plan, and what of its precisions is lost."""

    def __init__(self, job: Job) -> None:
        self._job, self._spec, self._plan = job, job.spec, job.plan
        self._float = {"float16": "f16", "bfloat16": "bf16"}[job.spec.dtype]
        self._lost: dict[str, list[str]] = {}  # what is lost, and of which units
        self._made: dict[tuple[int, str], None] = {}  # bits of the plan, and the types that they became
        self._index: Index = {}
        if job.model.checkpoint.is_gguf:
            metadata, self._index = read_gguf(job.model.checkpoint.path)
            self._form = gguf_form(metadata, self._index, job.spec.name)
            self._family = self._form.stored(self._index)
        else:
            self._form, self._family = self._form_of_family(), job.family
            if job.spec.stored or job.spec.source_hash:
                raise job.refuse(
                    f"{job.spec.name} is quantized in a form that llama.cpp's converter does not read; export the "
                    "model that it was made from"
                )

    def _form_of_family(self) -> GgufForm:
        family = self._job.family
        for form in FORMS.values():
            if form.family.name == family.name:
                return form
        raise self._job.refuse(f"llama.cpp has no models of the family {family.name}")

    def result(self) -> tuple[list[list[str]], str, list[str]]:
        """The commands that make the file, the file, what is lost."""
        options = {unit: self._plan.precision(unit) for unit in self._spec.units}
        given = self._job.model.checkpoint.path.resolve()
        if self._index and all(isinstance(option, Native) for option in options.values()):
            return [], str(given), []
        if self._index:
            source, commands = str(given), []
        else:
            source = f"model-{self._float}.gguf"
            words = ["python", _CONVERTER, str(given), "--outtype", self._float, "--outfile", source]
            commands = [words]
            if not any(option.quantized for option in options.values()):
                return commands, source, []
        types = self._layer_types()
        words = ["llama-quantize"]
        if any(entry.type not in _FLOATING for entry in self._index.values()):
            words.append("--allow-requantize")
        embedding, head = self._table_types()
        words += ["--token-embedding-type", embedding, "--output-tensor-type", head]
        for (name, kind), layers in types.items():
            words += ["--tensor-type", rf"^blk\.({'|'.join(map(str, layers))})\.{name}\.weight$={kind}"]
        # What no expression names is small; with a base of blocks of 32 nothing is left to llama-quantize to replace.
        words += [source, "model.gguf", "Q8_0"]
        commands.append(words)
        return commands, "model.gguf", self._losses()

    def _layer_types(self) -> dict[tuple[str, str], list[int]]:
        """Tensor and its type -> the layers where it has that."""
        found: dict[tuple[str, str], list[int]] = {}
        for layer in range(self._spec.num_layers):
            unit = f"layer.{layer}"
            names = self._form.linear_names(self._family, self._spec.layer_kind(layer).experts is not None)
            for linear in self._spec.linears(unit):
                for name in names[linear]:
                    k = self._spec.linears(unit)[linear].k
                    kind = self._type(unit, linear, f"blk.{layer}.{name}.weight", k)
                    found.setdefault((name, kind), []).append(layer)
        return found

    def _table_types(self) -> tuple[str, str]:
        """Of the embedding and of the head."""
        k, tied = self._spec.table.k, self._spec.tied_embeddings
        embedding = self._type("embedding", "table", "token_embd.weight", k)
        head = self._type("head", "table", f"{'token_embd' if tied else 'output'}.weight", k)
        if tied and embedding != head:
            self._lost["embedding and head share one table, which gets the wider of their two types"] = []
            embedding = head = max(embedding, head, key=_bits_per_weight)
        return embedding, head

    def _type(self, unit: str, linear: str, name: str, k: int) -> str:
        """The type of a linear's tensor, whose rows have k numbers."""
        option = self._plan.precision(unit)
        if isinstance(self._spec.linear_options(unit, option)[linear], Native) and name in self._index:
            return self._index[name].type.lower()
        precision = self._spec.linear_precisions(unit, option)[linear]
        kind = self._nearest(unit, precision, k) if precision.quantized else self._float
        if precision.quantized:
            self._made[precision.bits, kind] = None
        return kind

    def _nearest(self, unit: str, precision: Precision, k: int) -> str:
        """The type that is the nearest in bits and form to a quantized precision."""
        if k % _BLOCK:
            self._lost.setdefault(f"rows of {k} are no multiple of {_BLOCK}, and stay {self._float}", []).append(unit)
            return self._float
        if precision.bits == 8:
            return "q8_0"
        if precision.group_size == _BLOCK and precision.bits == 4:
            return "q4_0" if precision.zero == "sym" else "q4_1"
        if k % _SUPERBLOCK:
            self._lost.setdefault(f"rows of {k} are no multiple of {_SUPERBLOCK}, so not K types", []).append(unit)
            return "q4_0"
        return {3: "q3_k", 4: "q4_k"}[precision.bits]

    def _losses(self) -> list[str]:
        made = ", ".join(f"{bits} bits as {kind} ({_bits_per_weight(kind):g} a weight)" for bits, kind in self._made)
        lost = [f"the plan's groups, scales and quantizer: llama-quantize rounds by itself, {made}"]
        return [*lost, *(f"{what} ({_named(units)})" if units else what for what, units in self._lost.items())]


def _named(units: Sequence[str]) -> str:
    """Units in few words: "layers 0-3, 7, head"."""
    layers = sorted({int(unit.removeprefix("layer.")) for unit in units if unit.startswith("layer.")})
    runs = [list(run) for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs]
    others = [unit for unit in dict.fromkeys(units) if not unit.startswith("layer.")]
    return ", ".join(([f"layers {', '.join(spans)}"] if spans else []) + others)


def _bits_per_weight(kind: str) -> float:
    """Of a type, scales included."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return float(8 * size / block)
