"""Text to token ids and back, by the checkpoint's own tokenizer, through transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from llmpq.checkpoint.door import refusing, time_limit
from llmpq.checkpoint.gguf_tokenizer import open_gguf_tokenizer
from llmpq.checkpoint.vocabulary import token_bytes
from llmpq.spec import UsageError
from llmpq.spec.descriptors import silence
from llmpq.spec.json_file import read_object
from llmpq.spec.ranges import shown

TEMPLATE_S = 1.5  # seconds that a chat template may take
_MARK = "\u20428461\u2042"  # no template has it, and none that changes texts changes it
_TEMPLATE_ADDS = 2**20  # characters


class Tokenizer:
    """A transformers tokenizer behind the three things that are needed of it; `name` is what errors call it."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of plain text, if `special` with the tokens that the model expects around it (often a first one).

        Raises UsageError.
        """
        return self._encode(text, special=special)

    def encode_chat(self, messages: str | Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation in the model's chat template, ready to be answered; a text is a user's message.

        Each message has a "role", a "content" and what else the template asks for. `tools` are those that the model may
        call, as OpenAI describes them. Without a template, those of the plain text of a message. Raises UsageError if
        there are several then, or tools, which the template may have no place for, too; if there are several templates
        and none is the default, and if the template fails, or takes longer than TEMPLATE_S.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not self.has_chat_template:
            if tools:
                raise UsageError("the model has no chat template, so it takes no tools")
            if len(messages) > 1:
                raise UsageError("the model has no chat template, so it takes a single message")
            return self.encode(messages[0]["content"])
        templates = self._tokenizer.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            names = shown(", ".join(sorted(templates)))
            raise UsageError(f"{self._name} has the chat templates {names}, and none of them is named default")
        with refusing(f"the chat template of {self._name} fails"), time_limit(TEMPLATE_S):
            prompt = self._rendered(messages, tools)
            if tools and prompt == self._rendered(messages):
                raise UsageError(f"the chat template of {self._name} has no place for tools")
            given = sum(len(message["content"]) for message in messages) + sum(len(str(tool)) for tool in tools)
            if len(prompt) > 4 * given + _TEMPLATE_ADDS:  # it would take minutes to encode
                raise ValueError(f"it makes {len(prompt)} characters of {given}")
        return self._encode(prompt, special=False)

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The chat template's text of messages.

        Templates of some models that see images know contents only as lists of parts: they pass over a text, or fail.
        """
        from jinja2 import TemplateError

        how: dict[str, Any] = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": True}

        def render(messages: Sequence[dict[str, Any]], in_parts: bool) -> str:
            if in_parts:
                messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
            return str(self._tokenizer.apply_chat_template(list(messages), **how))

        def is_read(in_parts: bool) -> bool:
            try:
                return _MARK in render([*messages[:-1], {**messages[-1], "content": _MARK}], in_parts)
            except (TemplateError, TypeError, ValueError):
                return False

        return render(messages, not is_read(False) and is_read(True))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with refusing(f"the tokenizer of {self._name} cannot encode {shown(text)}"):
            return list(self._tokenizer.encode(text, add_special_tokens=special))

    def save(self, folder: Path) -> None:
        """Write it so that `open_tokenizer` reads it from there. Raises UsageError."""
        with refusing(f"the tokenizer of {self._name} cannot be written to {folder}"):
            self._tokenizer.save_pretrained(str(folder))

    @property
    def bos_token_id(self) -> int | None:
        """The token that texts begin with, if there is one, whether or not `encode` puts it there."""
        token: int | None = self._tokenizer.bos_token_id
        return token

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` asks for an answer; else the model continues the text."""
        return bool(self._tokenizer.chat_template)

    def decode(self, token_ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """Text of ids, without special tokens; a character whose bytes are incomplete is one replacement character.

        Of ids that continue those `after` which they come: what they add to the text. By themselves some tokenizers
        leave out the space that a text begins with.
        """
        before, whole = self._text(after), self._text([*after, *token_ids])
        return whole[len(before) :] if whole.startswith(before) else self._text(token_ids)

    def _text(self, token_ids: Sequence[int]) -> str:
        with refusing(f"the tokenizer of {self._name} cannot decode tokens"):
            ids = _whole_characters(token_ids, self._byte_ids)
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @functools.cached_property
    def vocabulary(self) -> tuple[bytes, ...]:
        """What each token adds to a text; see `token_bytes`. Raises UsageError."""
        with refusing(f"the tokens of {self._name} cannot be told apart"):
            return token_bytes(self._tokenizer)

    @functools.cached_property
    def _byte_ids(self) -> list[int]:
        """The ids of the tokens <0x00> to <0xFF>, which stand for single bytes; none if it has no such tokens."""
        vocabulary = self._tokenizer.get_vocab()
        ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]
        return [] if None in ids else ids


class ByteTokenizer(Tokenizer):
    """For a configuration with random weights and no tokenizer: a token is a byte, modulo the vocabulary's size."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [byte % self._vocab_size for byte in text.encode()]

    def save(self, folder: Path) -> None:
        pass

    @property
    def bos_token_id(self) -> int | None:
        return None

    @property
    def has_chat_template(self) -> bool:
        return False

    @functools.cached_property
    def vocabulary(self) -> tuple[bytes, ...]:
        return tuple(bytes([token % 256]) for token in range(self._vocab_size))

    def _text(self, token_ids: Sequence[int]) -> str:
        return bytes(token % 256 for token in token_ids).decode(errors="replace")


def _whole_characters(token_ids: Sequence[int], byte_ids: Sequence[int]) -> list[int]:
    """The same ids, but where those of single bytes are no UTF-8, in place of them those of replacement characters.

    Decoders take a row of such tokens for one text, and make each of its bytes a replacement character if any is wrong.
    """
    byte_of = {token: byte for byte, token in enumerate(byte_ids)}
    ids: list[int] = []
    for single, group in groupby(token_ids, byte_of.__contains__):
        if single:
            text = bytes(byte_of[token] for token in group).decode(errors="replace")
            ids += [byte_ids[byte] for byte in text.encode()]
        else:
            ids += group
    return ids


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a .gguf file or of a folder. Raises UsageError, also where text has no tokens in it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with refusing(f"the tokenizer of {path} cannot be read"):
        if path.suffix == ".gguf":
            return Tokenizer(open_gguf_tokenizer(path), str(path))
        _check_sentencepiece(path)
        tokenizer = _load(path)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            # For some families transformers makes up an empty tokenizer where a folder has none.
            raise ValueError("it has no tokens but special ones")
        return Tokenizer(tokenizer, str(path))


def _check_sentencepiece(folder: Path) -> None:
    """Raise UsageError if a folder's tokenizer needs packages that are missing: transformers would try another way."""
    if (folder / "tokenizer.json").is_file():
        return
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            is_sentencepiece = file.read(1) == b"\n"  # of a message of protobuf, the first field
        if is_sentencepiece and not (
            find_spec("sentencepiece") and find_spec("google") and find_spec("google.protobuf")
        ):
            raise UsageError(
                f"{path} takes the packages sentencepiece and protobuf; install them with "
                "`pip install 'llmpq[sentencepiece]'`, or give a folder with tokenizer.json"
            )


def _load(folder: Path) -> Any:
    """A folder's tokenizer. Code that lies there is never run, and nobody is asked whether it should be."""
    from transformers import AutoTokenizer

    with silence():  # the tokenizers library prints what it does not know of a file as it stands there
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    apart = folder / "chat_template.json"  # of models that see images, as older programs wrote it
    if tokenizer.chat_template is None and apart.is_file():
        tokenizer.chat_template = read_object(apart).get("chat_template")
    return tokenizer
