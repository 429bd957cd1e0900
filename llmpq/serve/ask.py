"""What is asked of the server: bodies of its requests, read and checked, as prompts and sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from llmpq.checkpoint.model_files import Model
from llmpq.runtime.completion import Completions
from llmpq.runtime.request import prompt_problem
from llmpq.runtime.sampling import SamplingParams
from llmpq.serve.body_sampling import OPENAI_TEMPERATURE, sampling_fields
from llmpq.serve.messages import MESSAGES, check_size, is_text, read_messages, refuse_unknown
from llmpq.serve.refusal import Refusal
from llmpq.serve.tool_calls import Tools, read_tools, with_demanded
from llmpq.spec import InvalidField, UsageError

MOST_TOP_LOGPROBS = 20  # beside each token, as OpenAI has it
MOST_RULES = 1024  # entries and characters of rules, as each is looked at for every token of an answer
MOST_GRAMMAR = 2**16  # characters of a schema, a regular expression or choices, which are read for each answer
_ANSWER_TOKENS = 16  # of a completion, if its body does not say; as OpenAI has it
_NO_TOOLS = Tools()
_PROMPT = "expected a prompt: a text, token ids, or a list of texts or of rows of token ids"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, in tokens and in sequences that are computed for it."""

    room: int  # of prompt and answer together
    answer: int | None  # of an answer; None: what there is room for
    sequences: int


@dataclass(frozen=True)
class Ask:
    """What a body asks for.

    include_usage: of a stream, whether the tokens are counted at its end. tools: the names of those that may be called.
    """

    prompts: list[list[int]]
    sampling: SamplingParams
    completions: Completions
    stream: bool
    include_usage: bool
    tools: frozenset[str]


class Reader:
    """Reads bodies for a model. All of it raises Refusal or UsageError for what is not done."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self._tokenizer = model.tokenizer

    def chat(self, body: dict[str, Any]) -> Ask:
        """A body of /v1/chat/completions."""
        refuse_unknown(body, ("messages", "tools", "tool_choice", "parallel_tool_calls"))
        tools = read_tools(body)
        prompt = self._conversation(body, tools)
        answered = self._tokenizer.has_chat_template
        most = self.limits.answer or self.limits.room
        max_tokens = min(most, max(1, self.limits.room - len(prompt)))
        return self._ask(body, [prompt], max_tokens, continued=not answered, tools=tools)

    def completion(self, body: dict[str, Any]) -> Ask:
        """A body of /v1/completions."""
        refuse_unknown(body, ("prompt",))
        prompts = self._prompts(body.get("prompt"))
        return self._ask(body, prompts, min(self.limits.answer or _ANSWER_TOKENS, _ANSWER_TOKENS), continued=True)

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """Those of a body of /tokenize, which has messages or a text as its prompt."""
        refuse_unknown(body, ("prompt", "messages", "tools", "tool_choice"))
        if body.get("messages") is not None:
            return self._conversation(body, read_tools(body))
        return self._plain(body.get("prompt"))

    def _conversation(self, body: dict[str, Any], tools: Tools) -> list[int]:
        messages = read_messages(body.get("messages"), MESSAGES)
        described = str(tools.described) if tools.described else ""
        whole = "".join([*(message["content"] for message in messages), described])
        check_size([whole], "the conversation", self.model)
        return self._tokenizer.encode_chat(messages, tools.described)

    def _prompts(self, given: Any) -> list[list[int]]:
        if not isinstance(given, list) or _are_tokens(given):
            given = [given]
        if not given:
            raise UsageError(_PROMPT)
        if len(given) > self.limits.sequences:
            raise UsageError(f"there are {len(given)} prompts, and at most {self.limits.sequences} are taken together")
        return [list(prompt) if _are_tokens(prompt) else self._plain(prompt) for prompt in given]

    def _plain(self, prompt: Any) -> list[int]:
        if not is_text(prompt):
            raise UsageError(_PROMPT)
        check_size([prompt], "the prompt", self.model)
        return self._tokenizer.encode(prompt)

    def _ask(
        self,
        body: dict[str, Any],
        prompts: list[list[int]],
        max_tokens: int,
        *,
        continued: bool,
        tools: Tools = _NO_TOOLS,
    ) -> Ask:
        sampling = _sampling(body, max_tokens, tools)
        stream, options = body.get("stream") or False, body.get("stream_options") or {}
        if not isinstance(stream, bool) or not isinstance(options, dict):
            raise UsageError("stream is true or false, and stream_options is an object")
        if stream and sampling.num_choices > sampling.n:
            raise UsageError("the best of several answers is known at their end; leave out stream or best_of")
        answers = len(prompts) * sampling.num_choices
        if answers > self.limits.sequences:
            raise UsageError(
                f"{answers} answers are asked for, and at most {self.limits.sequences} are sampled together"
            )
        for prompt in prompts:
            self._check(prompt, sampling)
        asked = Completions(self._tokenizer, prompts, sampling, [continued] * len(prompts))
        return Ask(prompts, sampling, asked, stream, bool(options.get("include_usage")), tools.names)

    def _check(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Raise Refusal if there is no room for a prompt and as long an answer."""
        limits = self.limits
        if limits.answer is not None and sampling.max_tokens > limits.answer:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"max_tokens is {sampling.max_tokens}, and an answer may have {limits.answer} tokens here",
                param="max_tokens",
            )
        problem = prompt_problem(prompt, self.model.spec.vocab_size, limits.room, "a slot", sampling.max_tokens)
        if problem is not None:
            too_long = len(prompt) + sampling.max_tokens > limits.room
            code = "context_length_exceeded" if too_long else None
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the prompt {problem}", code=code)


def _sampling(body: dict[str, Any], max_tokens: int, tools: Tools) -> SamplingParams:
    fields = with_demanded(sampling_fields(body), tools)
    if "prompt_logprobs" in fields:
        raise UsageError("prompt_logprobs is not supported here; `llmpq run` tells them")
    defaults = SamplingParams(max_tokens=max_tokens, temperature=OPENAI_TEMPERATURE).to_dict()
    try:
        sampling = SamplingParams.from_dict(defaults | fields)
    except InvalidField as error:
        field = error.path.partition("[")[0]
        raise Refusal(HTTPStatus.BAD_REQUEST, str(error), param=field) from None
    if (sampling.logprobs or 0) > MOST_TOP_LOGPROBS:
        raise UsageError(f"log-probabilities of at most {MOST_TOP_LOGPROBS} tokens are told beside each")
    _check_rules(sampling)
    return sampling


def _check_rules(sampling: SamplingParams) -> None:
    """Raise UsageError if rules of an answer take long: others wait meanwhile."""
    rows = (*sampling.stop, *sampling.bad_words, *sampling.bad_words_ids)
    entries = len(sampling.logit_bias) + len(sampling.stop_token_ids) + len(rows) + sum(map(len, rows))
    if entries > MOST_RULES:
        raise UsageError(
            "logit_bias, stop, stop_token_ids, bad_words and bad_words_ids have more than "
            f"{MOST_RULES} entries and characters together; leave some out"
        )
    grammar = (sampling.json_schema or "", sampling.regex or "", *sampling.choices)
    if sum(map(len, grammar)) > MOST_GRAMMAR:
        raise UsageError(f"{sampling.grammar} has more than {MOST_GRAMMAR} characters; say it in fewer")


def _are_tokens(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)
