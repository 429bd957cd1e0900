"""`llmpq run --interactive`: a conversation with a model that is loaded once, each turn of which is one request."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from llmpq.cli import signals
from llmpq.cli.conversation import Conversation
from llmpq.cli.options import read_model
from llmpq.cli.output_files import JsonLines, check_files
from llmpq.cli.plan_options import PlanOptions
from llmpq.cli.sampling_options import read_sampling
from llmpq.cli.shared_plan import share_plan
from llmpq.report import console
from llmpq.report.progress_bar import progress
from llmpq.report.streams import ERR, OUT
from llmpq.runtime.completion import Completion, Completions, outputs
from llmpq.runtime.sampling import SEEDS
from llmpq.spec import PromptError, UsageError

if TYPE_CHECKING:
    from llmpq.runtime.engine import Engine
    from llmpq.runtime.sampling import SamplingParams
    from llmpq.runtime.torchrun import Rank

_COMMAND = re.compile(r"/[a-z]+")
_HELP = "/clear begins anew, /exit or Ctrl-D ends the chat, Ctrl-C stops an answer"
_WITHOUT = ("prompt", "prompts", "batch_size", "json_out", "trace", "n", "best_of")


def run_chat(arguments: Namespace, rank: Rank | None) -> None:
    """Plan, load, and answer messages from standard input until it ends. Raises what `llmpq run` does."""

    for name in _WITHOUT:
        if getattr(arguments, name) is not None:
            raise UsageError(f"--interactive answers what is typed; leave out --{name.replace('_', '-')}")
    check_files(arguments)
    sampling, options = read_sampling(arguments), PlanOptions(arguments)
    with progress(arguments.quiet) as notify:
        model = read_model(arguments, notify)
        options.check(model)
        plan, solved = options.given or options.solve_longest(model, [1], arguments.max_new_tokens, notify)
        if rank is not None:
            share_plan(rank, plan, model, notify, runs=not arguments.dry_run)
    if not arguments.quiet:
        OUT.print(console.plan_table(plan, solved))
    if arguments.dry_run:
        return
    with ExitStack() as stack:
        with progress(arguments.quiet) as notify:
            engine = stack.enter_context(options.engine(model, plan, notify, rank=rank))
        lines = stack.enter_context(JsonLines(arguments.output))
        room = min(plan.max_length, model.spec.max_positions)
        sampling = replace(sampling, max_tokens=arguments.max_new_tokens or room)
        remembers = model.tokenizer.has_chat_template and not arguments.no_chat
        conversation = Conversation(model, room, min(sampling.max_tokens, room // 4), remembers)
        _Chat(engine, conversation, sampling, lines, arguments.quiet).run()
        lines.check()


class _Chat:
    """Reads messages, carries out commands, and shows answers as they come."""

    def __init__(
        self, engine: Engine, conversation: Conversation, sampling: SamplingParams, lines: JsonLines, quiet: bool
    ) -> None:
        self._engine, self._conversation, self._sampling = engine, conversation, sampling
        self._lines, self._quiet = lines, quiet
        self._typed = sys.stdin.isatty()
        self._answered, self._refused = 0, 0
        self._answering = self._stop_asked = False

    def run(self) -> None:
        """Raises PromptError at the end of what was not typed, if some of its messages were not answered."""
        if not self._quiet:
            _note(f"{self._how()}; the latest {self._conversation.room} tokens are kept; {_HELP}")
        if self._typed:
            with suppress(ImportError):
                import readline  # noqa: F401  gives `input` its editing, and what was typed before
        with signals.interrupting(self._interrupt) if self._typed else nullcontext():
            while self._one_more():
                pass
        if self._refused and not self._typed:
            raise PromptError(f"{self._refused} of {self._refused + self._answered} messages were not answered")

    def _how(self) -> str:
        if self._conversation.remembers:
            return "messages go through the model's chat template"
        why = "" if self._conversation.model.tokenizer.has_chat_template else "the model has "
        return f"{why}no chat template: plain continuation of each message by itself"

    def _one_more(self) -> bool:
        """Read a line and do what it says; False at the end."""
        try:
            text = self._read()
            if text is None or text == "/exit":
                return False
            self._take(text)
        except signals.Signalled:
            raise
        except KeyboardInterrupt:  # of _interrupt, where nothing is answered: what was typed so far is dropped
            OUT.print()
        except UsageError as error:
            self._refused += 1
            _note(f"llmpq: {error}")
        return True

    def _read(self) -> str | None:
        """The next line of standard input that is not blank, stripped; None at its end. Raises UsageError."""
        while True:
            try:
                line = input("> ") if self._typed else sys.stdin.buffer.readline().decode()
            except EOFError:
                OUT.print()
                return None
            except UnicodeDecodeError:
                raise UsageError("the message is not UTF-8 text") from None
            if line.strip():
                return line.strip()
            if not line and not self._typed:
                return None

    def _take(self, text: str) -> None:
        if not _COMMAND.fullmatch(text):
            self._answer(text)
        elif text == "/clear":
            self._conversation.turns.clear()
            _note("a new conversation")
        elif text == "/help":
            _note(_HELP)
        else:
            _note(f"there is no command {text}; {_HELP}")

    def _answer(self, text: str) -> None:
        ids, dropped = self._conversation.prompt(text)
        if dropped:
            what = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
            _note(f"{what} dropped: a conversation has room for {self._conversation.room} tokens")
        if not self._typed:
            OUT.print(Text(f"> {text}", style="bold"), soft_wrap=True)
        completion = self._complete(ids)
        answer, generated = completion
        OUT.print("\n")
        if generated.finish_reason == "cancelled":
            _note("stopped")
        elif generated.finish_reason == "length":
            _note(f"cut off after {len(generated.token_ids)} tokens")
        self._conversation.add(text, answer)
        for output in outputs([completion], text, self._answered):
            self._lines.write(output.to_dict())
        self._answered += 1

    def _complete(self, ids: Sequence[int]) -> Completion:
        """The answer, shown as it comes."""
        seed = self._sampling.seed
        sampling = self._sampling if seed is None else replace(self._sampling, seed=(seed + self._answered) % SEEDS)
        tokenizer, continued = self._conversation.model.tokenizer, not self._conversation.remembers
        found: list[Completion] = []

        def on_text(request: int, piece: str) -> None:
            _show(piece)
            if self._stop_asked:
                self._engine.stop()

        self._answering, self._stop_asked = True, False
        try:
            asked = Completions(tokenizer, [ids], [sampling], [continued])
            asked.generate(self._engine, on_end=lambda prompt, completions: found.extend(completions), on_text=on_text)
        finally:
            self._answering = False
        return found[0]

    def _interrupt(self) -> None:
        """What Ctrl-C does."""
        if not self._answering:
            raise KeyboardInterrupt
        self._stop_asked = True


def _show(text: str) -> None:
    if text:
        OUT.print(Text(text), end="", soft_wrap=True)


def _note(text: str) -> None:
    ERR.print(Text(text, style="dim"), soft_wrap=True)
