"""How a prompt is continued: the parameters of a request. What they do to logits is in logits_rules.py."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmpq.spec import InvalidField, Record, UsageError
from llmpq.spec.ranges import LARGEST, Choices, Count, Index, Number, Portion, Positive, Seed, Share
from llmpq.spec.record import check

SEEDS = LARGEST + 1  # a seed is below
_LISTS = ("stop", "stop_token_ids", "bad_words", "bad_words_ids", "choices")
_TEXTS = ("stop", "bad_words", "choices")
GRAMMARS = frozenset(("json_schema", "regex", "choices"))  # fields, of which one may be given


@dataclass(frozen=True, slots=True)
class SamplingParams(Record):
    """How a prompt is continued. The default is greedy: the likeliest token each time.

    Rules change logits in this order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty,
    bad_words, min_tokens, and what keeps the answer to json_schema, regex or choices. Then a token is drawn from those
    that temperature, top_k, top_p, min_p and typical_p leave, each of which takes what the one before it left.
    Log-probabilities are those of the model, before all of this.
    """

    max_tokens: Count = 64
    temperature: Number = 0.0  # 0: greedy, the next four are then without effect
    top_k: Index = 0  # choose among the k likeliest tokens; 0: among all
    top_p: Portion = 1.0  # choose among the fewest likeliest tokens that together have this probability
    min_p: Share = 0.0  # choose among tokens that have this share of the likeliest one's probability
    typical_p: Portion = 1.0  # among the fewest with this probability whose surprise is nearest to the expected one
    seed: Seed | None = None  # None: another one each time
    ignore_eos: bool = False  # go on to max_tokens, for measurements
    repetition_penalty: Positive = 1.0  # divides logits of tokens of prompt and answer, multiplies negative ones
    presence_penalty: float = 0.0  # taken from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # taken from them as often as the answer has them
    logit_bias: Mapping[Index, float] = field(default_factory=dict)  # added to the logits of these tokens
    bad_words: tuple[str, ...] = ()  # texts that never come as the tokens that a tokenizer makes of them
    bad_words_ids: tuple[tuple[Index, ...], ...] = ()  # rows of tokens that never come
    stop: tuple[str, ...] = ()  # texts before the first of which the answer ends
    stop_token_ids: tuple[Index, ...] = ()  # tokens that end it beside the end-of-sequence tokens, as these do
    min_tokens: Index = 0  # neither those nor `stop` end it before it has so many
    json_schema: str | None = None  # the answer is JSON of this schema (text, or the object); ends where that does
    regex: str | None = None  # all of the answer matches it; in the syntax of Rust's regex, without look-around
    choices: tuple[str, ...] = ()  # the answer is one of these texts
    n: Choices = 1  # how many answers; answer i but the first is sampled with the seed `choice_seed(seed, i)`
    best_of: Choices | None = None  # so many are sampled, and the n of the largest mean log-probability are kept
    logprobs: Index | None = None  # tell log-probabilities, beside each token's those of so many likeliest ones
    prompt_logprobs: Index | None = None  # the same of the prompt's tokens but the first

    def normalize(self) -> None:
        for name in _LISTS:  # callers write lists, or a single text
            value = getattr(self, name)
            if isinstance(value, str) and name in _TEXTS:
                value = (value,)
            if isinstance(value, list):
                value = tuple(tuple(each) if isinstance(each, list) else each for each in value)
            check(isinstance(value, tuple), name, "is no list")
            object.__setattr__(self, name, value)
        if isinstance(self.json_schema, (dict, bool)):
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        check(isinstance(self.logit_bias, Mapping), "logit_bias", "is no mapping")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # its caller may go on to change it

    def validate(self) -> None:
        for name in _LISTS:
            for i, value in enumerate(getattr(self, name)):
                check(value not in ("", ()), f"{name}[{i}]", "is empty")
        least, most = self.min_tokens, self.max_tokens
        check(least <= most, "min_tokens", f"is {least}, more than max_tokens, {most}")
        check(self.best_of is None or self.best_of >= self.n, "best_of", f"is {self.best_of}, fewer than n, {self.n}")
        check(
            self.num_choices == 1 or self.temperature > 0,
            "n" if self.n > 1 else "best_of",
            f"is {self.num_choices}, but at temperature 0 every answer is the same; give a temperature",
        )

        asked = [name for name in sorted(GRAMMARS) if getattr(self, name)]
        if self.json_schema is not None:
            _check_json(self.json_schema)
        for name in asked[1:]:
            check(False, name, f"is given beside {asked[0]}; leave out one of them")
        for name in ("bad_words", "bad_words_ids"):
            check(not asked or not getattr(self, name), name, f"may forbid all that {''.join(asked)} asks for")

    @property
    def grammar(self) -> str | None:
        """Which field has the grammar that the answer is to keep to, if there is one."""
        return next((name for name in GRAMMARS if getattr(self, name)), None)

    @property
    def num_choices(self) -> int:
        """How many answers are sampled."""
        return self.best_of or self.n

    @property
    def has_rules(self) -> bool:
        """Whether anything changes the logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        changed = self.logit_bias or self.bad_words_ids or self.min_tokens or self.grammar
        return penalties != (1, 0, 0) or bool(changed)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken each time, and nothing else is told."""
        return self.temperature == 0 and not self.has_rules and not self.asks_log_probs

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn by `llmpq.kernels.draw_`, and nothing else is asked for."""
        return self.temperature > 0 and self.typical_p == 1 and not self.has_rules and not self.asks_log_probs

    @property
    def asks_log_probs(self) -> bool:
        """Whether log-probabilities are to be told, of the prompt or of the answer."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    def ending(self, eos_token_ids: Sequence[int]) -> frozenset[int]:
        """The tokens that end an answer, given the model's end-of-sequence tokens."""
        return frozenset(self.stop_token_ids if self.ignore_eos else (*self.stop_token_ids, *eos_token_ids))

    @property
    def reads_prompt(self) -> bool:
        """Whether the last stage needs the prompt's tokens."""
        rows = any(len(row) > 1 for row in self.bad_words_ids)
        return self.repetition_penalty != 1 or rows or self.prompt_logprobs is not None

    @property
    def goes_on(self) -> bool:
        """Whether an answer can go on elsewhere from its tokens alone.

        Log-probabilities, and how a grammar ends, are told with each token, and known to those who chose it.
        """
        return not self.asks_log_probs and self.grammar is None

    def check_tokens(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raise UsageError if it speaks of tokens that a model's table of `vocab_size` does not have.

        Also if bad words, and before min_tokens the tokens that end an answer, may leave none of the table's to choose.
        """
        tokens = {
            "logit_bias": [*self.logit_bias],
            "bad_words_ids": [token for row in self.bad_words_ids for token in row],
            "stop_token_ids": [*self.stop_token_ids],
        }
        for name, ids in tokens.items():
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = max(ids) if min(ids) >= 0 else min(ids)
                raise UsageError(f"{name} has the token {wrong}, and the model's table has {vocab_size}, from 0")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise UsageError(f"{name} is {getattr(self, name)}, and the model has {vocab_size} tokens")
        forbidden = {row[-1] for row in self.bad_words_ids}
        if self.min_tokens:
            forbidden |= self.ending(eos_token_ids)
        if forbidden.issuperset(range(vocab_size)):
            raise UsageError(
                f"bad_words, with min_tokens, may forbid all {vocab_size} tokens of the model at once; leave some out"
            )


def _schema_text(schema: Any) -> str:
    """JSON of a schema. Raises InvalidField."""
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InvalidField("json_schema", "is no JSON") from None


def _check_json(text: str) -> None:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidField("json_schema", "is no JSON") from None


def choice_seed(seed: int, choice: int) -> int:
    """The seed of an answer (from 0) of a request with this seed: far from those of other requests."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} choice {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SEEDS


def spread(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """The same parameters for `count` requests, of which request i (from 0) has the seed `sampling.seed` + i.

    So equal prompts differ. Where there is no seed, one is drawn.
    """
    first = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed
    return [replace(sampling, seed=(first + i) % SEEDS) for i in range(count)]


def each_sampling(sampling: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """The sampling parameters of `count` requests, given those of all, which are `spread`, or each with its own.

    Those that sample have a seed, if need be a drawn one; greedy ones have none. Raises UsageError if there are
    parameters for another number of requests.
    """
    if isinstance(sampling, SamplingParams):
        sampling = spread(sampling, count)
    elif len(sampling) != count:
        raise UsageError(f"there are {count} prompts, but sampling parameters for {len(sampling)}")

    def seed(params: SamplingParams) -> int | None:
        if params.temperature == 0:
            return None
        return secrets.randbelow(SEEDS) if params.seed is None else params.seed

    return [replace(params, seed=seed(params)) for params in sampling]
