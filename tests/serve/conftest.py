"""One engine and one server for all tests of answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from llmpq.checkpoint.model_files import Model, open_model
from llmpq.runtime.engine import Engine
from tests.support.served import CAPACITY, KEY, MIXED, SAMPLED, TEXT, Served, outputs, plan_of, save_chat_model, serving


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    save_chat_model(folder)
    return open_model(str(folder))


@pytest.fixture(scope="package")
def served(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(plan_of(model), model.checkpoint, model.spec))
        plain = [{k: v for k, v in body.items() if k != "stream"} for body in MIXED]
        bodies = [*plain, *SAMPLED, TEXT | {"max_tokens": 60}]
        answers = outputs(engine, model, bodies, tmp_path_factory.mktemp("batch"))
        session = stack.enter_context(engine.session())
        url = stack.enter_context(serving(session, model, capacity=CAPACITY, key=KEY))
        yield Served(session, url, model, answers)
