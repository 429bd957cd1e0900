"""Requests that are handed in while others run: same tokens as offline, cancelled one by one, never left waiting."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.runtime.engine import Engine, Generated, Handle, Request, SamplingParams, Session
from llmpq.spec import UsageError, WorkerLostError
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model

PROMPTS = random_prompts(3, 9, 1, 20, 7, 4, 5)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=1900)
SOON_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa", max_position_embeddings=2048)


def new_engine(checkpoint: Checkpoint, split: tuple[int, ...] = (2, 1), slots: int = 2) -> Engine:
    spec = load_spec(checkpoint)
    return Engine(make_plan(spec, split, 2, 1, slots=slots, max_length=2000), checkpoint, spec)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    with new_engine(checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Generated]:
    """Each prompt's continuation without any other."""
    return [engine.generate([prompt], GREEDY).sequences[0] for prompt in PROMPTS]


def request(index: int, sampling: SamplingParams = GREEDY) -> Request:
    return Request(tuple(PROMPTS[index]), sampling)


def submit_long(session: Session, index: int) -> tuple[Handle, list[int]]:
    """A request that goes on until it is cancelled, and its tokens so far. Returns once it has two."""
    tokens: list[int] = []
    decoding = threading.Event()

    def on_token(token: int) -> None:
        tokens.append(token)
        if len(tokens) == 2:
            decoding.set()

    handle = session.submit(request(index, LONG), on_token)
    assert decoding.wait(SOON_S)
    return handle, tokens


def test_requests_of_many_threads_get_what_each_gets_alone(engine: Engine, alone: list[Generated]) -> None:
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    ended: list[Generated] = []
    handles: dict[int, Handle] = {}
    with engine.session() as session:

        def hand_in(first: int) -> None:
            for i in range(first, len(PROMPTS), 3):
                handles[i] = session.submit(request(i), streamed[i].append, ended.append)
                time.sleep(0.01 * first)

        threads = [threading.Thread(target=hand_in, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results = [handles[i].result(SOON_S) for i in range(len(PROMPTS))]
        time.sleep(0.2)  # with nothing to do
        again = session.submit(request(3)).result(SOON_S)
    assert results == alone and again == alone[3]
    assert streamed == [list(generated.token_ids) for generated in alone]
    assert sorted(ended, key=alone.index) == alone
    for handle, generated in zip((handles[i] for i in range(len(PROMPTS))), alone, strict=True):
        times = handle.times
        assert times is not None and times.tokens == len(generated.token_ids)
        assert times.ttft_s is not None and times.ttft_s > 0 and times.tpot_s is not None


@pytest.mark.parametrize("split, slots", [((3,), 1), ((1, 1, 1), 5)], ids=str)
def test_one_slot_and_more_stages_than_requests(
    split: tuple[int, ...], slots: int, checkpoint: Checkpoint, alone: list[Generated]
) -> None:
    with new_engine(checkpoint, split, slots) as other:
        with other.session() as session:
            first = session.submit(request(0))
            one_token = session.submit(request(1, replace(GREEDY, max_tokens=1)))
            assert first.result(SOON_S) == alone[0]
            assert one_token.result(SOON_S).token_ids == alone[1].token_ids[:1]
        assert list(other.generate(PROMPTS, GREEDY).sequences) == alone


def test_cancelled_requests_end_and_change_no_other(engine: Engine, alone: list[Generated]) -> None:
    with engine.session() as session:
        first, tokens = submit_long(session, 0)
        second, _ = submit_long(session, 1)
        waiting = [session.submit(request(i)) for i in (2, 3)]  # there are two slots
        waiting[0].cancel()
        assert waiting[0].result(SOON_S) == Generated((), "cancelled")
        times = waiting[0].times
        assert times is not None and (times.first_token_s, times.tokens) == (None, 0)
        first.cancel()
        cancelled = first.result(SOON_S)
        assert waiting[1].result(SOON_S) == alone[3]
        first.cancel()  # it has ended
        in_prefill = session.submit(Request((5,) * 1500, LONG))
        in_prefill.cancel()
        assert in_prefill.result(SOON_S).finish_reason == "cancelled"
        assert session.submit(request(4)).result(SOON_S) == alone[4]
        session.cancel()
        assert second.result(SOON_S).finish_reason == "cancelled"
    assert cancelled.finish_reason == "cancelled" and cancelled.token_ids == tuple(tokens)
    assert cancelled.token_ids[:12] == alone[0].token_ids[: len(tokens)]


def test_many_that_come_together_can_all_be_cancelled_at_once(checkpoint: Checkpoint, alone: list[Generated]) -> None:
    with new_engine(checkpoint, slots=8) as other, other.session() as session:
        handles = session.submit_all([Request((5,) * 1500, LONG)] * 20)
        session.cancel()
        assert [handle.result(SOON_S).finish_reason for handle in handles] == ["cancelled"] * 20
        assert session.submit(request(0)).result(SOON_S) == alone[0]


def test_a_prompt_that_cannot_be_run_ends_nothing(engine: Engine, alone: list[Generated]) -> None:
    with engine.session() as session:
        with pytest.raises(UsageError, match="prompt 1 is empty"):
            session.submit(Request(()))
        assert session.submit(request(0)).result(SOON_S) == alone[0]
        session.close()
        with pytest.raises(ValueError, match="closed"):
            session.submit(request(0))


def test_an_engine_runs_one_session_at_a_time(engine: Engine, alone: list[Generated]) -> None:
    with engine.session() as session:
        handle, _ = submit_long(session, 0)
        with pytest.raises(ValueError, match="in use; hand requests to its session"):
            engine.generate([PROMPTS[0]], GREEDY)
        with pytest.raises(ValueError, match="in use"):
            engine.score([PROMPTS[0]])
        handle.cancel()
    assert engine.generate([PROMPTS[0]], GREEDY).sequences[0] == alone[0]
    assert len(engine.score([PROMPTS[0]])[0].log_probs) == len(PROMPTS[0]) - 1


def test_who_scores_has_the_engine_alone_and_learns_that_it_was_closed(checkpoint: Checkpoint) -> None:
    engine = new_engine(checkpoint)
    refused: list[str] = []

    def interfere() -> None:
        for use in (lambda: engine.generate([PROMPTS[0]], GREEDY), engine.session().__enter__):
            with pytest.raises(ValueError, match="in use") as error:
                use()
            refused.append(str(error.value))
        engine.close()

    os.kill(engine.pids[1], signal.SIGSTOP)  # so that scoring takes until the end
    meanwhile = threading.Timer(0.5, interfere)
    meanwhile.start()
    with pytest.raises(WorkerLostError, match="closed before it was done"):
        engine.score([PROMPTS[0]])
    meanwhile.join()
    assert len(refused) == 2 and ended(engine.pids)


def test_a_session_has_no_prompt_of_an_earlier_batch(engine: Engine) -> None:
    engine.generate(PROMPTS[:2], GREEDY)
    with engine.session() as session:
        handle, _ = submit_long(session, 0)
        with pytest.raises(IndexError):
            engine.stop(0)
        assert not handle.future.done()
        engine.stop()
        assert handle.result(SOON_S).finish_reason == "cancelled"


def test_a_callback_cannot_wait_for_a_result(engine: Engine, alone: list[Generated]) -> None:
    waited: list[Handle] = []

    def on_end(generated: Generated) -> None:
        waited.append(session.submit(request(1)))
        with pytest.raises(ValueError, match="a callback cannot wait for a result"):
            waited[0].result(1.0)

    with engine.session() as session:
        assert session.submit(request(0), on_end=on_end).result(SOON_S) == alone[0]
    assert waited[0].result() == alone[1]


def test_an_interrupt_while_what_was_handed_in_is_awaited_ends_it(checkpoint: Checkpoint) -> None:
    engine = new_engine(checkpoint)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), engine.session() as session:
            handles = [submit_long(session, 0)[0], *(session.submit(request(i % 7, LONG)) for i in range(30))]
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.closed and ended(engine.pids)
    for handle in handles:
        with pytest.raises(WorkerLostError, match="closed before it was done"):
            handle.result(0)


def test_an_error_in_the_block_cancels_what_runs(engine: Engine, alone: list[Generated]) -> None:
    with pytest.raises(KeyError), engine.session() as session:
        handle, _ = submit_long(session, 0)
        raise KeyError
    assert handle.result(0).finish_reason == "cancelled"
    assert engine.generate([PROMPTS[0]], GREEDY).sequences[0] == alone[0]


def test_sampled_requests_draw_a_seed_and_can_be_repeated(engine: Engine) -> None:
    free = replace(GREEDY, temperature=1.5, seed=None)
    with engine.session() as session:
        samples = [session.submit(request(1, free)).result(SOON_S) for _ in range(2)]
        again = [session.submit(request(1, replace(free, seed=s.seed))).result(SOON_S) for s in samples]
    assert samples == again and samples[0] != samples[1]


def ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_who_waits_learns_that_the_engine_was_closed(checkpoint: Checkpoint) -> None:
    engine = new_engine(checkpoint)
    with pytest.raises(WorkerLostError, match="closed before it was done"), engine.session() as session:
        handles = [submit_long(session, 0)[0], *(session.submit(request(i, LONG)) for i in (1, 2))]
        closing = threading.Thread(target=engine.close)
        closing.start()
        for handle in handles:
            with pytest.raises(WorkerLostError, match="closed before"):
                handle.result(SOON_S)
        closing.join()
        with pytest.raises(WorkerLostError):
            session.submit(request(0))
    assert engine.closed and ended(engine.pids)


def test_who_waits_learns_of_a_lost_worker_even_while_nothing_runs(checkpoint: Checkpoint) -> None:
    engine = new_engine(checkpoint)
    with pytest.raises(WorkerLostError, match="stage 1 on cpu1"), engine.session() as session:
        session.submit(request(0)).result(SOON_S)
        os.kill(engine.pids[1], signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="stage 1 on cpu1"):
            session.submit(request(0, LONG)).result(SOON_S)
    assert engine.closed and ended(engine.pids)


@pytest.mark.full
def test_what_a_callback_raises_ends_the_session(checkpoint: Checkpoint) -> None:
    engine = new_engine(checkpoint)

    def on_token(token: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), engine.session() as session:
        session.submit(request(0), on_token).result(SOON_S)
    assert engine.closed and ended(engine.pids)
