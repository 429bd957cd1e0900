"""A device is lost and the requests go on elsewhere: their results are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.checkpoint.tokenizer import ByteTokenizer
from llmpq.runtime.engine import Engine
from llmpq.runtime.grammar import packed
from llmpq.runtime.handle import Handle
from llmpq.runtime.pipeline import Served
from llmpq.runtime.request import Ends, Generated, Request
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.session import Session
from llmpq.spec import GrammarLostError, InfeasibleError, LlmpqError, ModelSpec, Plan, RequestTimes, WorkerLostError
from tests.support.pipelines import make_plan, random_prompts
from tests.support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts(5, 9, 3, 7, 4, 6, 8, 5)  # more than the plan's slots
SAMPLING = [
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=1.2, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=24, repetition_penalty=1.5, ignore_eos=True),
    SamplingParams(max_tokens=24, presence_penalty=2.0, frequency_penalty=0.5, ignore_eos=True),
    SamplingParams(max_tokens=24, logprobs=2, prompt_logprobs=1, ignore_eos=True),  # begins again
    SamplingParams(max_tokens=20, temperature=0.7, seed=1, top_k=9),
    SamplingParams(max_tokens=24, min_tokens=9),
    SamplingParams(max_tokens=24, regex="[a-m]{16}"),  # begins again
]
VOCABULARY = ByteTokenizer(VOCAB_SIZE).vocabulary


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Generated, ...]:
    with Engine(make_plan(spec, [3], 2, 2), checkpoint, spec) as engine:
        return engine.generate(PROMPTS, SAMPLING, vocabulary=VOCABULARY).sequences


def slow(spec: ModelSpec, *split: int) -> Plan:
    """A plan that is not over before what is to happen to it."""
    plan = make_plan(spec, split, 2, 2)
    devices = tuple(replace(device, slowdown=10) for device in plan.cluster.devices)
    return replace(plan, cluster=replace(plan.cluster, devices=devices))


class Strikes:
    """Lose the worker of a rank each time so many tokens have come."""

    def __init__(self, at: dict[int, int], number: int = signal.SIGKILL) -> None:
        self._left, self._number = dict(at), number
        self.tokens: dict[int, list[int]] = {}  # that have come, by request

    def on(self, engine: Engine) -> Callable[[int, int], None]:
        def take(request: int, token: int) -> None:
            self.tokens.setdefault(request, []).append(token)
            rank = self._left.pop(sum(map(len, self.tokens.values())), None)
            if rank is not None:
                os.kill(engine.pids[rank], self._number)

        return take


def onto(plan: Plan, checkpoint: Checkpoint, spec: ModelSpec, lost: list[str]) -> Callable[..., Served]:
    """Go on with this plan."""

    def go_on(device: str, before: Plan, error: LlmpqError) -> Served:
        assert isinstance(error, WorkerLostError)
        lost.append(device)
        return Served(plan, checkpoint, spec)

    return go_on


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, rank",
    [(signal.SIGKILL, 1), pytest.param(signal.SIGKILL, 0, marks=pytest.mark.full)]
    + [pytest.param(signal.SIGSTOP, rank, marks=pytest.mark.full) for rank in range(2)],
)
def test_all_kinds_of_requests_go_on_where_they_were(
    number: signal.Signals, rank: int, checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...]
) -> None:
    lost: list[str] = []
    on_loss = onto(make_plan(spec, [3], 2, 2), checkpoint, spec, lost)
    ended: list[int] = []
    strikes = Strikes({30: rank}, number)
    with Engine(slow(spec, 2, 1), checkpoint, spec, on_loss=on_loss) as engine:
        result = engine.generate(
            PROMPTS,
            SAMPLING,
            on_end=lambda request, generated: ended.append(request),
            on_tokens=strikes.on(engine),
            vocabulary=VOCABULARY,
        )
        assert engine.plan.stages == make_plan(spec, [3], 2, 2).stages
        (loss,) = engine.losses
        again = engine.generate(PROMPTS[:2], SAMPLING[:2]).sequences
    assert result.sequences == undisturbed
    assert again == undisturbed[:2]
    assert [tuple(strikes.tokens[i]) for i in range(len(PROMPTS))] == [each.token_ids for each in undisturbed]
    assert sorted(ended) == list(range(len(PROMPTS)))
    assert lost == [f"cpu{rank}"] == [loss.device]
    assert loss.requests > 0 and loss.tokens > 0 and not loss.changed
    assert "has not answered" in loss.reason if number == signal.SIGSTOP else "SIGKILL" in loss.reason
    for times, each in zip(result.times, result.sequences, strict=True):
        assert times.first_token_s is not None and times.first_token_s > times.arrived_s >= 0
        assert times.tokens == len(each.token_ids)
    assert max(times.ended_s for times in result.times) > loss.loading_s


@pytest.mark.slow
def test_one_loss_after_the_other_is_survived_and_the_last_is_the_end(
    checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...], caplog: pytest.LogCaptureFixture
) -> None:
    plans = [slow(spec, 1, 2), slow(spec, 3)]

    def on_loss(device: str, before: Plan, error: LlmpqError) -> Served:
        if not plans:
            raise InfeasibleError(f"{error}; nothing is left", ("more memory",))
        return Served(plans.pop(0), checkpoint, spec)

    with Engine(slow(spec, 1, 1, 1), checkpoint, spec, on_loss=on_loss) as engine:
        strikes = Strikes({20: 2, 60: 0}).on(engine)
        assert engine.generate(PROMPTS, SAMPLING, on_tokens=strikes, vocabulary=VOCABULARY).sequences == undisturbed
        assert [loss.device for loss in engine.losses] == ["cpu2", "cpu0"]
        assert "planning again without cpu0" in caplog.text and "goes on without cpu0" in caplog.text
        assert caplog.text.count("texts are those of a run without it") == 2
        with pytest.raises(InfeasibleError, match=r"SIGKILL.*; nothing is left") as caught:
            engine.generate(PROMPTS[:7], SAMPLING[:7], on_tokens=Strikes({10: 0}).on(engine))
        assert caught.value.relaxations == ("more memory",) and engine.closed


@pytest.mark.slow
def test_other_widths_are_said(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    wide = make_plan(spec, [3], 2, 2)
    other = wide.with_precisions([replace(wide.precision("head"), bits=8)] * len(spec.units))
    on_loss = onto(other, checkpoint, spec, [])
    with Engine(slow(spec, 2, 1), checkpoint, spec, on_loss=on_loss) as engine:
        # Those that go on: they have other tokens than before from then on.
        result = engine.generate(PROMPTS[:4], SAMPLING[:4], on_tokens=Strikes({30: 1}).on(engine))
        (loss,) = engine.losses
    assert loss.changed == tuple(unit for unit in spec.units if wide.precision(unit) != other.precision(unit))
    assert [len(each.token_ids) for each in result.sequences] == [24] * 4


@pytest.mark.slow
def test_what_was_cancelled_stays_so_and_a_session_goes_on(
    checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...]
) -> None:
    on_loss = onto(slow(spec, 3), checkpoint, spec, [])
    with Engine(slow(spec, 2, 1), checkpoint, spec, on_loss=on_loss) as engine:
        with engine.session() as session:
            handles: list[Handle] = []
            strike = Strikes({6: 0}).on(engine)

            def cancel(token: int) -> None:
                strike(0, token)
                if len(handles[0].tokens) == 8:
                    handles[0].cancel()

            for i, (prompt, sampling) in enumerate(zip(PROMPTS[:7], SAMPLING[:7], strict=True)):
                on_token = cancel if i == 0 else None
                handles.append(session.submit(Request(tuple(prompt), sampling), on_token))
            results = [handle.result(60) for handle in handles]
            later = session.submit(Request(tuple(PROMPTS[1]), SAMPLING[1])).result(60)
        assert len(engine.losses) == 1
    assert results[1:] == list(undisturbed[1:7]) and later == undisturbed[1]
    assert results[0].finish_reason == "cancelled"
    count = len(results[0].token_ids)
    assert 8 <= count < 24 and results[0].token_ids == undisturbed[0].token_ids[:count]


@pytest.mark.slow
def test_a_loss_before_all_are_loaded_is_survived_too(
    checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...]
) -> None:
    lost: list[str] = []

    def notify(text: str, share: float | None = None, /) -> None:
        if text == "loading the stages" and not lost:
            children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)

    on_loss = onto(make_plan(spec, [3], 2, 2), checkpoint, spec, lost)
    with Engine(slow(spec, 2, 1), checkpoint, spec, on_loss=on_loss, notify=notify) as engine:
        assert lost == ["cpu1"] and engine.losses[0].requests == 0
        assert engine.generate(PROMPTS[:7], SAMPLING[:7]).sequences == undisturbed[:7]


def test_the_loss_of_what_follows_grammars_is_none_of_a_device() -> None:
    first = Workers(error=GrammarLostError("the process that follows grammars has ended"))

    def replacement(error: LlmpqError, in_flight: object) -> Workers:
        raise AssertionError("no device was lost")

    session = Session(first, count(), lambda requests: None, replacement=replacement)
    handle = session.submit(Request((1, 1), SamplingParams(max_tokens=4)))
    with pytest.raises(GrammarLostError):
        session.listen()
    with pytest.raises(GrammarLostError):
        handle.result()


class Workers:
    """Stand for a WorkerGroup: say these events, then are lost; note what they are told."""

    def __init__(self, *events: dict[str, object], error: LlmpqError | None = None) -> None:
        self.rank, self.workers, self._events = 0, [self], list(events)
        self._error = error or WorkerLostError("gone")
        self.knows_vocabulary = False
        self.told: list[tuple[str, dict[str, object]]] = []

    def send(self, command: str, **fields: object) -> None:
        self.told.append((command, fields))

    def say(self, event: dict[str, object]) -> None:
        self._events.append(event)

    def wake(self) -> None:
        pass

    def receive_unless(self, condition: object) -> tuple[Workers, dict[str, object]]:
        if not self._events:
            raise self._error
        return self, self._events.pop(0)


@pytest.mark.parametrize("last, reason", [(5, "length"), (2, "stop"), (4, None)])
def test_an_end_that_was_not_told_is_told_and_none_that_has_not_come(last: int, reason: str | None) -> None:
    tokens = [9, 9, last] if reason != "length" else [9, 9, 9, last]
    first = Workers(*({"event": "tokens", "tokens": [(0, token)]} for token in tokens))
    generated = Generated((*tokens, 7), "length").to_dict()
    times = RequestTimes(0.0, 0.5, 1.0, 4).to_dict()
    result = {"event": "result", "spans": [], "value": "measured"}
    second = Workers(
        *([] if reason else [{"event": "ended", "request": 0, "generated": generated, "times": times}]), result
    )
    request = Request((1, 1), SamplingParams(max_tokens=4))
    session = Session(
        first,
        count(),
        lambda requests: None,
        replacement=lambda error, in_flight: second,
        ends=lambda request: Ends(request, 40, [2]),
    )
    heard: list[int] = []
    handle = session.submit(request, heard.append)
    session.close()
    assert session.listen() == ("measured", [])
    assert handle.result() == Generated((*tokens, 7) if reason is None else tuple(tokens), reason or "length")
    assert heard == tokens and handle.times is not None and handle.times.tokens == len(handle.result().token_ids)
    said = [command for command, _ in second.told]
    assert said == (["finish"] if reason else ["submit", "finish"])
    if reason is None:
        ((_, asked),) = second.told[0][1]["requests"]
        assert asked["prompt"] == [1, 1] and asked["answered"] == [9, 9, 4] and asked["sampling"]["max_tokens"] == 4


def begun_again(tokens: list[int], *then: dict[str, object]) -> tuple[Handle, Workers, list[int]]:
    """A request whose log-probabilities are asked for, and which is cancelled once 7 and 8 have come, begins again."""
    events = [{"event": "tokens", "tokens": [(0, token)]} for token in tokens]
    second = Workers(*events, *then, {"event": "result", "spans": [], "value": "measured"})
    first = Workers(*({"event": "tokens", "tokens": [(0, token)]} for token in (7, 8)))
    session = Session(first, count(), lambda requests: None, replacement=lambda error, in_flight: second)
    heard: list[int] = []

    def hear(token: int) -> None:
        heard.append(token)
        if len(heard) == 2:
            handle.cancel()

    handle = session.submit(Request((1, 1), SamplingParams(max_tokens=4, logprobs=0)), hear)
    session.close()
    assert session.listen() == ("measured", [])
    return handle, second, heard


def ended(*tokens: int) -> dict[str, object]:
    times = RequestTimes(0.0, 0.5, 1.0, len(tokens)).to_dict()
    return {"event": "ended", "request": 0, "generated": Generated(tokens, "cancelled").to_dict(), "times": times}


def test_who_begins_again_and_was_cancelled_first_gets_all_that_had_come() -> None:
    handle, second, heard = begun_again([7, 8], ended(7, 8))
    assert [command for command, _ in second.told] == ["submit", "finish", "cancel"]
    assert heard == [7, 8] and handle.result().token_ids == (7, 8)


def test_who_begins_again_with_other_tokens_ends_with_those_that_had_come() -> None:
    handle, second, heard = begun_again([7, 6, 5], ended(7, 6, 5))
    assert [command for command, _ in second.told] == ["submit", "finish", "cancel"]
    assert heard == [7, 8] and handle.result() == Generated((7, 8), "cancelled")


def test_a_grammar_that_comes_while_others_take_over_brings_its_vocabulary() -> None:
    """They are those of before, who have let go of what they were told."""
    group = Workers()

    def replacement(error: LlmpqError, in_flight: object) -> Workers:
        sampling = SamplingParams(max_tokens=4, regex="a")
        session.submit_all([Request((1, 1), sampling)], vocabulary=[b"a", b"b"])
        group.say({"event": "result", "spans": [], "value": "measured"})
        return group

    session = Session(group, count(), lambda requests: None, replacement=replacement)
    assert session.listen() == ("measured", [])
    ((command, fields),) = group.told
    assert command == "submit" and fields["vocabulary"] == packed([b"a", b"b"])
