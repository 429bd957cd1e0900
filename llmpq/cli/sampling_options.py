"""Options that say how prompts are continued that do not say it themselves: fields of SamplingParams."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from llmpq import demo
from llmpq.cli.parser import positive
from llmpq.spec import InvalidField, UsageError
from llmpq.spec.json_file import read_object

if TYPE_CHECKING:
    from llmpq.runtime.sampling import SamplingParams

# Of each field its option, what reads it, how its value is called, and what it is for; without that, it is listed in a
# line with others, as the help is to fit a screen.
_OPTIONS: dict[str, tuple[str, Any, str, str | None]] = {
    "max_tokens": ("--max-new-tokens", positive, "N", "of each (default: 64, none in a chat)"),
    "temperature": ("--temperature", float, "X", "0 is greedy (default)"),
    "top_k": ("--top-k", int, "N", None),
    "top_p": ("--top-p", float, "X", None),
    "seed": ("--seed", int, "N", "of sampling (default: another one each time)"),
    "stop": ("--stop", str, "TEXT", "end before this text; repeatable"),
    "n": ("--n", int, "N", None),
    "logprobs": ("--logprobs", int, "N", "log-probabilities, of the N likeliest too, in --output and --json-out"),
    "min_p": ("--min-p", float, "X", None),
    "typical_p": ("--typical-p", float, "X", None),
    "repetition_penalty": ("--repetition-penalty", float, "X", None),
    "presence_penalty": ("--presence-penalty", float, "X", None),
    "frequency_penalty": ("--frequency-penalty", float, "X", None),
    "logit_bias": ("--logit-bias", str, "ID=X", None),
    "bad_words": ("--bad-words", str, "TEXT", None),
    "stop_token_ids": ("--stop-token-ids", int, "ID", None),
    "min_tokens": ("--min-new-tokens", int, "N", None),
    "best_of": ("--best-of", int, "N", None),
    "json_schema": ("--json-schema", str, "FILE", None),
    "regex": ("--regex", str, "REGEX", None),
    "choices": ("--choices", str, "TEXT", None),
    "prompt_logprobs": ("--prompt-logprobs", int, "N", None),
}
_REPEATABLE = ("stop", "logit_bias", "bad_words", "stop_token_ids", "choices")


def add_sampling(group: argparse._ArgumentGroup) -> None:
    for field, (flag, read, metavar, about) in _OPTIONS.items():
        group.add_argument(
            flag,
            type=read,
            metavar=metavar,
            action="append" if field in _REPEATABLE else "store",
            help=about or argparse.SUPPRESS,
        )
    listed = ", ".join(
        f"{flag} {metavar}{'*' * (field in _REPEATABLE)}"
        for field, (flag, _, metavar, about) in _OPTIONS.items()
        if about is None
    )
    group.description = f"also, as SamplingParams has them (*: repeatable): {listed}, like --logprobs"


def read_sampling(arguments: Namespace) -> SamplingParams:
    """How prompts are continued that do not say it themselves. Raises UsageError."""
    from llmpq.runtime.sampling import SamplingParams

    given = {field: getattr(arguments, flag[2:].replace("-", "_")) for field, (flag, *_) in _OPTIONS.items()}
    fields = {"max_tokens": demo.MAX_NEW_TOKENS} | {field: value for field, value in given.items() if value is not None}
    if "logit_bias" in fields:
        fields["logit_bias"] = dict(map(_bias, fields["logit_bias"]))
    if "json_schema" in fields:
        fields["json_schema"] = read_object(fields["json_schema"])
    try:
        return SamplingParams(**fields)
    except InvalidField as error:
        field, bracket, index = error.path.partition("[")
        raise UsageError(f"{_OPTIONS[field][0]}{bracket}{index} {error.problem}") from None


def _bias(text: str) -> tuple[int, float]:
    """A token and what is added to its logit. Raises UsageError."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias is {text!r}, expected a token's id and a number such as 50=-2.5") from None
