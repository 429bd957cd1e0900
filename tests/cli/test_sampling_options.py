"""Options of sampling: each arrives in its field, and what is wrong is named by its option."""

from __future__ import annotations

import pytest

from llmpq import demo
from llmpq.cli.parser import Parser
from llmpq.cli.sampling_options import add_sampling, read_sampling
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError


def sampling(*arguments: str) -> SamplingParams:
    parser = Parser(prog="x")
    add_sampling(parser.add_argument_group("sampling"))
    return read_sampling(parser.parse_args(arguments))


def test_every_option_that_is_given_arrives() -> None:
    given = {
        "": {},
        "--max-new-tokens 5": {"max_tokens": 5},
        "--temperature 0.5 --top-k 3 --top-p 0.5 --seed 0": {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 0},
        "--min-p 0.1 --typical-p 0.9": {"min_p": 0.1, "typical_p": 0.9},
        "--repetition-penalty 1.1": {"repetition_penalty": 1.1},
        "--presence-penalty -1 --frequency-penalty 0.5": {"presence_penalty": -1.0, "frequency_penalty": 0.5},
        "--logit-bias 5=-2.5 --logit-bias 7=1": {"logit_bias": {5: -2.5, 7: 1.0}},
        "--bad-words a --bad-words b": {"bad_words": ("a", "b")},
        "--stop a --stop b --stop-token-ids 3 --stop-token-ids 4": {"stop": ("a", "b"), "stop_token_ids": (3, 4)},
        "--min-new-tokens 2": {"min_tokens": 2},
        "--n 2 --best-of 3 --temperature 1": {"n": 2, "best_of": 3, "temperature": 1.0},
        "--logprobs 0 --prompt-logprobs 2": {"logprobs": 0, "prompt_logprobs": 2},
    }
    for arguments, fields in given.items():
        expected = SamplingParams.from_dict(SamplingParams(**{"max_tokens": demo.MAX_NEW_TOKENS, **fields}).to_dict())
        assert sampling(*arguments.split()) == expected, arguments


def test_help_says_what_may_be_repeated_and_where_log_probabilities_are_written() -> None:
    parser = Parser(prog="x")
    add_sampling(parser.add_argument_group("sampling"))
    text = " ".join(parser.format_help().split())
    for flag in ("--logit-bias ID=X", "--bad-words TEXT", "--stop-token-ids ID", "--choices TEXT"):
        assert f"{flag}*" in text
    assert text.count("*,") == 4 and "--stop TEXT end before this text; repeatable" in text
    assert "in --output and --json-out" in text and "--prompt-logprobs N, like --logprobs" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--min-p 2", "--min-p is 2.0, expected 0 to 1"),
        ("--n 2", "--n is 2, but at temperature 0 every answer is the same; give a temperature"),
        ("--logit-bias 5", "--logit-bias is '5', expected a token's id and a number such as 50=-2.5"),
        ("--logit-bias 5=inf", "--logit-bias[5] is inf, expected a finite number"),
        ("--min-new-tokens 9 --max-new-tokens 8", "--min-new-tokens is 9, more than max_tokens, 8"),
        ("--stop-token-ids -1", "--stop-token-ids[0] is -1, expected 0 to 1000000000"),
    ],
)
def test_what_is_wrong_is_named_by_its_option(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        sampling(*arguments.split())
    assert str(error.value) == message
