"""Completions: the requests that prompts stand for, and what becomes of their tokens as text.

Here is what takes a tokenizer, which stages do not have: stop strings and bad words; and what takes several requests of
one prompt: `n` and `best_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

from llmpq.checkpoint.text_stream import TextStream
from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.runtime.engine import Engine
from llmpq.runtime.grammar import grammars_of
from llmpq.runtime.handle import Handle
from llmpq.runtime.request import Generated, RunResult, make_requests
from llmpq.runtime.sampling import SamplingParams, choice_seed, each_sampling
from llmpq.runtime.session import Session
from llmpq.spec import Output, UsageError
from llmpq.spec.ranges import shown


class Completion(NamedTuple):
    """An answer. A stop string ends its text, and its tokens with the one that completes it."""

    text: str
    generated: Generated


class Completions:
    """Prompts, each with sampling parameters, as requests: `num_choices` of each, one after the other.

    `token_ids` and `sampling` are those of the requests, `prompts` the number of each one's prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        continued: Sequence[bool],
    ) -> None:
        """Of prompts that are `continued`, the text goes on; the others are answered.

        Raises UsageError for a bad word without tokens, and for a grammar that cannot be kept to.
        """
        self._tokenizer, self._given, self._continued = tokenizer, prompts, continued
        self._params = each_sampling(sampling, len(prompts))
        self.prompts = [i for i, params in enumerate(self._params) for _ in range(params.num_choices)]
        self.token_ids = [prompts[i] for i in self.prompts]
        self.sampling = [each for params in self._params for each in _requests(params, tokenizer)]
        self._vocabulary = tokenizer.vocabulary if any(params.grammar for params in self._params) else None

    def generate(
        self,
        engine: Engine,
        on_progress: Callable[[int], None] = lambda generated: None,
        on_end: Callable[[int, list[Completion]], None] = lambda prompt, completions: None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> RunResult:
        """Have them continued; what came back for the requests, before stop strings cut it.

        `on_progress` is called with the number of tokens so far; `on_end` with each prompt (its number from 0) and its
        `n` completions as soon as all are there; `on_text` with a request's number and what its next token adds to its
        text, which may be nothing.
        """
        answers = _Answers(self, engine.stop, on_end, on_text)
        on_tokens = answers.take if answers.streams else None
        return engine.generate(self.token_ids, self.sampling, on_progress, answers.end, on_tokens, self._vocabulary)

    def submit(
        self,
        session: Session,
        on_end: Callable[[int, list[Completion]], None],
        on_text: Callable[[int, str], None] | None = None,
        on_request: Callable[[int, str], None] = lambda request, reason: None,
    ) -> list[Handle]:
        """Hand them in while others run: the handle of each request. What is called is as in `generate`.

        `on_request` is called with each request's number and why it has ended. All on the thread that listens. Raises
        what Session.submit does.
        """
        handed_in: Future[list[Handle]] = Future()  # a token may be here before their handles are

        def stop(request: int) -> None:
            session.cancel([handed_in.result()[request]])

        answers = _Answers(self, stop, on_end, on_text, on_request)
        on_token = answers.take if answers.streams else None
        requests = make_requests(self.token_ids, self.sampling)
        handles = session.submit_all(requests, on_token, answers.end, self._vocabulary)
        handed_in.set_result(handles)
        return handles

    def params(self, request: int) -> SamplingParams:
        """Those of its prompt."""
        return self._params[self.prompts[request]]

    def stream(self, request: int) -> TextStream:
        """For the text of its answer."""
        params, after = self.params(request), self.after(self.prompts[request])
        return TextStream(self._tokenizer, after=after, stop=params.stop, min_tokens=params.min_tokens)

    def text(self, request: int, token_ids: Sequence[int]) -> str:
        """The text of an answer that nothing stops."""
        return self._tokenizer.decode(token_ids, after=self.after(self.prompts[request]))

    def after(self, prompt: int) -> Sequence[int]:
        """What the texts of answers to a prompt go on from."""
        return self._given[prompt] if self._continued[prompt] else ()


class _Answers:
    """The answers to requests as they come. `streams`: of those whose text is read, or shown, meanwhile."""

    def __init__(
        self,
        asked: Completions,
        stop: Callable[[int], None],
        on_end: Callable[[int, list[Completion]], None],
        on_text: Callable[[int, str], None] | None,
        on_request: Callable[[int, str], None] = lambda request, reason: None,
    ) -> None:
        """`stop` has a request end with the token that is on its way."""
        self._asked, self._stop, self._on_end, self._on_text = asked, stop, on_end, on_text
        self._on_request = on_request
        requests = range(len(asked.sampling))
        self.streams = {i: asked.stream(i) for i in requests if on_text is not None or asked.params(i).stop}
        self._texts = dict.fromkeys(self.streams, "")
        self._ended: dict[int, dict[int, Completion]] = {}  # by prompt and request

    def take(self, request: int, token: int) -> None:
        """A request's next token."""
        stream = self.streams.get(request)
        if stream is None or stream.stopped:
            return
        piece = stream.add(token)
        if stream.stopped:
            self._stop(request)
        self._show(request, piece)

    def end(self, request: int, generated: Generated) -> None:
        """A request is done."""
        stream = self.streams.get(request)
        if stream is None:
            completion = Completion(self._asked.text(request, generated.token_ids), generated)
        else:
            self._show(request, stream.end())
            completion = _cut(generated, stream, self._texts[request])
        self._on_request(request, completion.generated.finish_reason)
        prompt, params = self._asked.prompts[request], self._asked.params(request)
        found = self._ended.setdefault(prompt, {})
        found[request] = completion
        if len(found) == params.num_choices:
            self._on_end(prompt, _kept([found[i] for i in sorted(found)], params))

    def _show(self, request: int, piece: str) -> None:
        self._texts[request] += piece
        if self._on_text is not None:
            self._on_text(request, piece)


def outputs(completions: Sequence[Completion], prompt: str, index: int, custom_id: str | None = None) -> list[Output]:
    """What became of a prompt with this place among all."""
    return [
        Output(
            prompt,
            text,
            found.token_ids,
            found.finish_reason,
            index,
            custom_id,
            found.seed,
            choice=choice,
            log_probs=found.log_probs,
            prompt_log_probs=found.prompt_log_probs,
        )
        for choice, (text, found) in enumerate(completions)
    ]


def _requests(params: SamplingParams, tokenizer: Tokenizer) -> list[SamplingParams]:
    """The parameters of the requests that a prompt stands for."""
    chosen_by = 0 if params.num_choices > params.n else None
    logprobs = chosen_by if params.logprobs is None else params.logprobs
    plain = replace(spelled(params, tokenizer), stop=(), n=1, best_of=None, logprobs=logprobs)
    if params.seed is None:
        return [plain]
    return [replace(plain, seed=choice_seed(params.seed, choice)) for choice in range(params.num_choices)]


def spelled(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same parameters with the tokens of `bad_words` in their place.

    Raises UsageError if one has none, and for a grammar that no answer can keep to.
    """
    if params.grammar is not None:
        grammars_of(tokenizer).check(params)
    if not params.bad_words:
        return params
    rows = [row for word in params.bad_words for row in _rows(word, tokenizer)]
    return replace(params, bad_words=(), bad_words_ids=tuple(dict.fromkeys((*params.bad_words_ids, *rows))))


def _rows(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A text's tokens, as it begins a text and as it comes behind a space."""
    rows = [tuple(tokenizer.encode(text, special=False)) for text in (word, f" {word}")]
    if not all(rows):
        raise UsageError(f"bad_words has {shown(word)}, of which the tokenizer makes no tokens")
    return rows


def _cut(generated: Generated, stream: TextStream, text: str) -> Completion:
    """What is left of an answer, and its text, if a stop string has ended it."""
    if not stream.stopped:
        return Completion(text, generated)
    log_probs = generated.log_probs
    cut = replace(
        generated,
        token_ids=generated.token_ids[: stream.num_tokens],
        finish_reason="stop",
        log_probs=None if log_probs is None else log_probs[: stream.num_tokens],
    )
    return Completion(text, cut)


def _kept(completions: list[Completion], params: SamplingParams) -> list[Completion]:
    """The `n` completions of a prompt: as they are given, or of more the likeliest, these first."""
    if params.num_choices > params.n:
        completions = sorted(completions, key=_mean_log_prob, reverse=True)[: params.n]
    if params.logprobs is None:  # they may have been asked for to choose by
        return [each._replace(generated=replace(each.generated, log_probs=None)) for each in completions]
    return completions


def _mean_log_prob(completion: Completion) -> float:
    found = completion.generated.log_probs
    return sum(each.log_prob for each in found) / len(found) if found else -math.inf
