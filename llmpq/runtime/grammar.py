"""Structured output: answers that keep to a JSON schema, a regular expression, or one of some texts.

llguidance (https://github.com/guidance-ai/llguidance), of the extra `structured`, reads the grammar and says after each
token which may follow.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

if TYPE_CHECKING:
    from llmpq.checkpoint.tokenizer import Tokenizer

_LONGEST = 200  # characters of a reason
_PLACES = r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?"  # in a grammar that the user has not written
# Where JSON may have white space: a model that likes it too much would make nothing else.
_SPACE = r"( |\n[ \t]{0,32})?"
_JSON = {"x-guidance": {"whitespace_pattern": _SPACE}}
# Any tokens that spell a text, not those alone that its tokenizer would make of it.
_ANY_TOKENS = '%llguidance {"no_forcing": true}'

_NO_TOKEN = "no token of the model begins or continues an answer that keeps to it"
_DEAD_END = "NoExtensionBias"  # as llguidance calls that

Ending = Literal["stop", "length"]
ENDINGS: tuple[Ending | None, ...] = (None, "stop", "length")  # as numbers


class Next(NamedTuple):
    """What may follow the tokens of an answer: `tokens` has a bit for each, the lowest of a byte first.

    may_end: whether the answer is complete. ended: "stop" if nothing can follow it then, "length" if nothing can though
    it is not complete; `problem` tells in a line why.
    """

    tokens: bytes
    may_end: bool
    ended: Ending | None
    problem: str = ""


class Grammars:
    """Makes the grammars of one vocabulary."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        """Of each token what it adds to a text. Raises UsageError without llguidance."""
        check_package()
        import llguidance

        self._vocabulary = vocabulary
        # Its tables for common grammars ("slices") take more memory than they save time.
        wrapper = llguidance.TokenizerWrapper(_Tokens(vocabulary))
        self._tokenizer = llguidance.LLTokenizer(wrapper, slices=[])
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def start(self, params: SamplingParams) -> Grammar:
        """The grammar that parameters ask for, of an answer that is to begin. Raises UsageError for what is none."""
        import llguidance

        try:
            source = _source(params)
        except ValueError as error:
            raise UsageError(f"{params.grammar}: {_reason(str(error))}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UsageError(f"{params.grammar}: {_reason(matcher.get_error())}")
        return Grammar(matcher, len(self._vocabulary))

    def check(self, params: SamplingParams) -> None:
        """Raise UsageError if parameters ask for a grammar that no answer can keep to."""
        first = self.start(params).next
        if first.ended is not None:
            raise UsageError(f"{params.grammar}: {first.problem or _NO_TOKEN}")
        texts = ((token, self._vocabulary[token]) for token in params.stop_token_ids if token < len(self._vocabulary))
        for token, text in texts:
            if text:
                raise UsageError(
                    f"stop_token_ids has {token}, the text {shown(text.decode(errors='replace'))}, which "
                    f"{params.grammar} may ask for; give it as stop"
                )


class Grammar:
    """How far an answer is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self.next = self._look()

    def add(self, token: int) -> Next:
        """The answer's next token, and what may follow it."""
        if self.next.ended is None:
            self._matcher.consume_token(token)
            self.next = self._look()
        return self.next

    def _look(self) -> Next:
        bits = bytearray(self._matcher.compute_bitmask())
        bits[self._vocab_size // 8] &= ~(1 << self._vocab_size % 8)  # the token that ends, which is llguidance's own
        may_end = self._matcher.is_accepting()
        if self._matcher.is_error():  # a token that could not come, or a grammar beyond the library's limits
            return Next(bytes(bits), may_end, "length", _reason(self._matcher.get_error()))
        if any(bits) or may_end:
            return Next(bytes(bits), may_end, None if any(bits) else "stop")
        return Next(bytes(bits), False, "length", _NO_TOKEN)


class _Tokens:
    """A vocabulary as llguidance asks for it; its last token ends the answer."""

    bos_token_id = None

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self.tokens = [*vocabulary, b""]
        self.eos_token_id = len(vocabulary)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        return []  # no text has to be made tokens of: see _ANY_TOKENS


def check_package() -> None:
    """Raise UsageError if llguidance is missing."""
    if find_spec("llguidance") is None:
        raise UsageError(
            "structured output takes the package llguidance; install it with `pip install 'llmpq[structured]'`"
        )


@functools.lru_cache(maxsize=1)
def grammars_of(tokenizer: Tokenizer) -> Grammars:
    """Those of a tokenizer's vocabulary. Raises UsageError."""
    check_package()
    return Grammars(tokenizer.vocabulary)


def packed(vocabulary: Sequence[bytes]) -> str:
    """A vocabulary as a short text."""
    text = json.dumps([token.decode("latin-1") for token in vocabulary])
    return base64.b64encode(zlib.compress(text.encode(), 1)).decode()


def unpacked(text: str) -> list[bytes]:
    """What `packed` made a text of."""
    return [token.encode("latin-1") for token in json.loads(zlib.decompress(base64.b64decode(text)))]


def _source(params: SamplingParams) -> str:
    """A grammar as llguidance reads it. Raises ValueError for a schema that is no JSON object."""
    from llguidance import LLMatcher, regex_to_lark

    if params.json_schema is not None:
        schema = json.loads(params.json_schema)
        if not isinstance(schema, dict):
            raise ValueError("the schema is no object")
        start = f"%json {json.dumps(schema | _JSON)}"
    else:
        # The library follows a regular expression of many texts, and not as many alternatives of a grammar.
        regex = "|".join(map(_escaped, params.choices)) if params.regex is None else params.regex
        start = f"/{regex_to_lark(regex, '')}/"
    return str(LLMatcher.grammar_from_lark(f"{_ANY_TOKENS}\nstart: {start}"))


def _escaped(text: str) -> str:
    """A regular expression of one text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _reason(error: str) -> str:
    """What llguidance has against a grammar, in a line."""
    told = re.search(r"^error: (.*)$", error, re.MULTILINE)  # of a regular expression, below a picture of it
    line = told[1] if told else re.sub(_PLACES, "", error.partition("\n")[0])
    if line == _DEAD_END:
        return _NO_TOKEN
    return "".join(character if character.isprintable() else " " for character in line[:_LONGEST])
