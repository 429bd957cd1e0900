"""The prompts of a run, as the model takes them, and what becomes of each.

A prompt that cannot be run has its error among the outputs; the others are answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmpq.checkpoint.model_files import Model
from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.cli.batch_results import results
from llmpq.cli.prompts import Prompt
from llmpq.runtime.completion import Completion, Completions, outputs, spelled
from llmpq.runtime.request import prompt_problem
from llmpq.runtime.sampling import GRAMMARS, SamplingParams, spread
from llmpq.serve.messages import check_size
from llmpq.serve.tool_calls import with_demanded
from llmpq.spec import InvalidField, Output, PromptError, UsageError


@dataclass
class _Item:
    """A prompt with its place among all."""

    index: int
    prompt: Prompt
    sampling: SamplingParams
    token_ids: list[int]
    continued: bool  # its text goes on; else it went through a chat template, to be answered


class Batch:
    """`items` are those that can be run, `outputs` what is known of any, by their place."""

    def __init__(self, prompts: Sequence[Prompt], sampling: SamplingParams, model: Model, first: int = 0) -> None:
        """With sampling parameters for all (see `spread`), of which a prompt may change its own.

        `first` is the place of the first one. Raises UsageError if none of the prompts can be run.
        """
        self._tokenizer, self._vocab_size, self._model = model.tokenizer, model.spec.vocab_size, model.spec.name
        self._prompts, self._first = prompts, first
        self._given: dict[int, _Item] = {}
        self.outputs: dict[int, list[Output]] = {}
        self._items: list[_Item] = []
        for index, (prompt, params) in enumerate(zip(prompts, spread(sampling, len(prompts)), strict=True), first):
            try:
                check_size([message["content"] for message in prompt.messages], prompt.where, model)
                self._items.append(item := _item(index, prompt, params, model))
                self._given[index] = item
            except UsageError as error:
                self._refuse(index, prompt, str(error))
        self.refuse_longer(model.spec.max_positions, f"the context of {model.spec.name}")

    def refuse_longer(self, room: int, place: str, output_len: int = 1) -> None:
        """Refuse the prompts that `prompt_problem` has something against. Raises UsageError if none is left."""
        left = []
        for item in self._items:
            problem = prompt_problem(item.token_ids, self._vocab_size, room, place, output_len)
            if problem is None:
                left.append(item)
            else:
                self._refuse(item.index, item.prompt, f"{item.prompt.where} {problem}")
        self._items = left
        if not left:
            self.check()

    def _refuse(self, index: int, prompt: Prompt, error: str) -> None:
        self.outputs[index] = [Output(prompt.text, "", (), "error", index, prompt.custom_id, error=error)]

    @property
    def template(self) -> str:
        """What became of the prompts' texts, in a line for the user."""
        chats, total = sum(not item.continued for item in self._items), len(self._items)
        if chats == total:
            return "prompts go through the model's chat template"
        if chats:
            return f"{chats} of {total} prompts go through the model's chat template; the others are continued as given"
        why = "no chat template" if self._tokenizer.has_chat_template else "the model has no chat template"
        return f"{why}: plain continuation"

    @property
    def completions(self) -> Completions:
        """Those asked for by the prompts that can be run."""
        items = self._items
        return Completions(
            self._tokenizer,
            [item.token_ids for item in items],
            [item.sampling for item in items],
            [item.continued for item in items],
        )

    def answer(self, number: int, completions: Sequence[Completion]) -> list[Output]:
        """What became of a prompt, by its number among those that can be run; it is kept."""
        item = self._items[number]
        found = outputs(completions, item.prompt.text, item.index, item.prompt.custom_id)
        self.outputs[item.index] = found
        return found

    def results(self, index: int) -> list[dict[str, Any]]:
        """What is known of a prompt, by its place, as lines of --output."""
        prompt, found = self._prompts[index - self._first], self.outputs[index]
        item = self._given.get(index)
        if item is None:
            return results(prompt, found, self._model, self._tokenizer)
        after = item.token_ids if item.continued else ()
        return results(prompt, found, self._model, self._tokenizer, len(item.token_ids), after)

    @property
    def in_order(self) -> tuple[Output, ...]:
        """What is known, in the order of the prompts."""
        return tuple(output for index in sorted(self.outputs) for output in self.outputs[index])

    def check(self) -> None:
        """Raise PromptError if some prompts have an error; UsageError if all do."""
        errors = [output.error for output in self.in_order if output.error is not None]
        total = len(errors) + len(self._items)
        if errors and not self._items:
            raise UsageError(errors[0] if total == 1 else f"none of {total} prompts can be run; the first: {errors[0]}")
        if errors:
            raise PromptError(f"{len(errors)} of {total} prompts were not answered; the first: {errors[0]}")


def _item(index: int, prompt: Prompt, sampling: SamplingParams, model: Model) -> _Item:
    """Raises UsageError if it cannot be run."""
    if prompt.error is not None:
        raise UsageError(prompt.error)
    tokenizer = model.tokenizer
    continued = prompt.continued or not tokenizer.has_chat_template
    try:
        fields = {"temperature": sampling.temperature or prompt.default_temperature}
        fields |= with_demanded(prompt.sampling, prompt.tools)
        if not GRAMMARS.isdisjoint(fields):  # it takes the place of another
            sampling = replace(sampling, json_schema=None, regex=None, choices=())
        sampling = spelled(SamplingParams.from_dict(sampling.to_dict() | fields), tokenizer)
        sampling.check_tokens(model.spec.vocab_size, model.spec.eos_token_ids)
        tools = prompt.tools.described
        if continued and tools:
            raise UsageError("tools take a chat template, and there is none, or --no-chat leaves it out")
        ids = _plain_tokens(prompt, tokenizer) if continued else tokenizer.encode_chat(prompt.messages, tools)
    except (InvalidField, UsageError) as error:
        raise UsageError(f"{prompt.where}: {error}") from None
    return _Item(index, prompt, sampling, ids, continued)


def _plain_tokens(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Of a prompt that goes through no chat template. Raises UsageError for a conversation."""
    if prompt.token_ids:
        return list(prompt.token_ids)
    if len(prompt.messages) > 1:
        why = "--no-chat leaves out" if tokenizer.has_chat_template else "the model does not have"
        raise UsageError(f"it has {len(prompt.messages)} messages, which takes a chat template, and {why} one")
    return tokenizer.encode(prompt.text)
