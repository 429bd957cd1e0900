"""A conversation with a model, as the tokens of its next prompt: as many of the latest turns as there is room for."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmpq.checkpoint.model_files import Model
from llmpq.cli.prompts import given_prompt
from llmpq.runtime.request import prompt_problem
from llmpq.serve.messages import Message, check_size
from llmpq.spec import UsageError


@dataclass
class Conversation:
    """In `room` tokens, of which `reserved` are for the next answer where old turns can be left out for it.

    If not `remembers`, no message knows of those before it, and the model goes on with its text.
    """

    model: Model
    room: int
    reserved: int
    remembers: bool
    turns: list[tuple[Message, Message]] = field(default_factory=list)  # questions and their answers

    def prompt(self, text: str) -> tuple[list[int], int]:
        """Token ids of the conversation with this message as its next, and how many of the oldest turns are dropped.

        Raises UsageError if the message is none, or leaves no room for an answer by itself.
        """
        message = given_prompt(text, "the message")
        if message.error is not None:
            raise UsageError(message.error)
        check_size([text], message.where, self.model)
        for dropped in range(len(self.turns) + 1):
            ids = self._encode(text, self.turns[dropped:])
            if len(ids) + self.reserved <= self.room:
                break
        problem = prompt_problem(ids, self.model.spec.vocab_size, self.room, "the plan's slots")
        if problem is not None:
            raise UsageError(f"the message {problem}")
        del self.turns[:dropped]
        return ids, dropped

    def add(self, question: str, answer: str) -> None:
        """One more turn."""
        if self.remembers:
            self.turns.append(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))

    def _encode(self, text: str, turns: list[tuple[Message, Message]]) -> list[int]:
        if not self.remembers:
            return self.model.tokenizer.encode(text)
        before = [message for turn in turns for message in turn]
        return self.model.tokenizer.encode_chat([*before, {"role": "user", "content": text}])
