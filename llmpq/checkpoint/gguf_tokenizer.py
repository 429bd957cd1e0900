r"""The tokenizer of a GGUF file, as transformers converts it.

A file names how text is split before tokens are merged, and other programs know what the name stands for: llama.cpp in
src/llama-vocab.cpp, from where these names and expressions are. transformers knows some; others it splits as GPT-2.
That takes seconds, so it is done once and kept in the cache.
"""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmpq.cache import find, keep
from llmpq.checkpoint.gguf_header import Metadata, tokenizer_alone
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown
from llmpq.temporary import working_folder

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
_HAN = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
)
# Name -> expressions. What one of them matches, and what lies between, is split by the next.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (f"{_ENDINGS}|{_WORDS % '{1,3}'}",),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (f"{_ENDINGS}|{_WORDS % '{1,3}'}",)),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "hunyuan", "deepseek-r1-qwen", "kormo", "megrez", "solar-open"),
        (f"{_ENDINGS}|{_WORDS % ''}",),
    ),
    "tekken": (_CASES % ("", "", ""),),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_CASES % (f"{_ENDINGS}?", f"{_ENDINGS}?", "{1,3}"),)),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
}
# Those whose texts begin with the first token where the file does not say it, and of whose words no merges are looked
# up if they are tokens.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")

_KEEP_SPACES = "<unk>", "<s>", "<|endoftext|>"  # of Phi-3: the special tokens after which white space counts


def open_gguf_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a GGUF file. The key of the cache is all that it depends on.

    Raises UsageError where there is none, or where it splits text in an unknown way, and what transformers raises of
    one that it does not know.
    """
    metadata, alone = tokenizer_alone(path)
    if "tokenizer.ggml.model" not in metadata:
        raise UsageError(f"{path} holds no tokenizer: it has no tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre")
    if metadata["tokenizer.ggml.model"] == "gpt2" and split is not None and split not in _SPLITS:
        raise UsageError(
            f"{path} has tokenizer.ggml.pre = {shown(split)}, a way to split text that is not known; known are "
            f"{', '.join(_SPLITS)}"
        )
    made_by = [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "gguf", "llmpq")]
    given = made_by, _SPLITS, metadata.get("general.name")
    key = hashlib.sha256(alone + repr(given).encode()).hexdigest()[:16]
    tokenizer = find("tokenizers", key, read_saved)
    if tokenizer is None:
        with working_folder() as folder:
            (folder / "model.gguf").write_bytes(alone)
            _converted(folder, metadata).save_pretrained(str(folder / "converted"))
            tokenizer = read_saved(folder / "converted")
        keep("tokenizers", key, tokenizer.save_pretrained)
    return tokenizer


def read_saved(folder: Path) -> Any:
    """A tokenizer that was saved there. AutoTokenizer may choose a family's class, which makes it anew another way."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _converted(folder: Path, metadata: Metadata) -> Any:
    """Of model.gguf in a folder, which holds the tokenizer alone.

    transformers would take what lies beside a model's own file for a part of it, and trip over what that says of the
    model; so would its AutoTokenizer, which asks for a configuration.
    """
    from tokenizers import Regex, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = metadata.get("tokenizer.ggml.pre")
    kind = metadata["tokenizer.ggml.model"]
    defaults: dict[str, Any] = {"add_bos_token": True} if kind == "gpt2" and split in _WHOLE_WORDS else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(folder), local_files_only=True, gguf_file="model.gguf", **defaults
    )
    backend = tokenizer.backend_tokenizer
    if kind == "gpt2" and split is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in _SPLITS[split]),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.model.ignore_merges = split in _WHOLE_WORDS
    if kind == "llama":
        _set_spaces(backend, metadata)
    return tokenizer


def _set_spaces(backend: Any, metadata: Metadata) -> None:
    """Have spaces in the sentencepiece tokenizer of a file as llama.cpp has them.

    One is put before a text, and before what follows a special token, unless the file says otherwise. After those of
    Phi-3, which is known by its name where it is stored as another architecture, white space is left out.
    """
    from tokenizers import AddedToken, decoders, normalizers

    architecture, name = metadata["general.architecture"], metadata.get("general.name")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", not architecture.startswith("gemma"))
    put, drop = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*put, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *drop])
    if re.search("phi-?3", f"{architecture} {name}", re.IGNORECASE):
        added = [token for token in backend.get_added_tokens_decoder().values() if token.content not in _KEEP_SPACES]
        backend.add_tokens([AddedToken(t.content, rstrip=True, normalized=False, special=t.special) for t in added])
