"""A tiny model with a chat template, and a server of it on a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from llmpq.checkpoint.model_files import Model
from llmpq.runtime.session import Session
from llmpq.serve.app import build_app
from llmpq.serve.ask import Limits, Reader
from llmpq.serve.metrics import Metrics
from llmpq.serve.plan_view import describe
from llmpq.serve.server import Server, bind, url
from llmpq.serve.service import Service
from llmpq.spec import Plan
from tests.support import tiny_models
from tests.support.pipelines import UNIFORM, make_plan

ROOM = 2000  # tokens of prompt and answer
SLOTS = 4
_TEMPLATE = "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
_TEMPLATE += "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
_TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


def save_chat_model(folder: Path) -> None:
    """Its tokens are bytes, and none of them ends an answer."""
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, max_position_embeddings=2048, eos_token_id=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)


def plan_of(model: Model) -> Plan:
    """In two stages."""
    return make_plan(model.spec, [2, 1], 2, 2, slots=SLOTS, max_length=ROOM, precisions=UNIFORM)


@contextmanager
def serving(
    session: Session, model: Model, *, capacity: int = 8, key: str | None = None, drain_s: float = 1.0
) -> Iterator[str]:
    """Its base URL."""
    reader = Reader(model, Limits(ROOM, None, capacity))
    service = Service(session, Metrics(SLOTS, None), capacity)
    with bind("127.0.0.1", 0) as bound:
        server = Server(build_app(service, reader, describe(plan_of(model), None), key), service, bound, drain_s)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield url(bound)
        finally:
            server.stop()
            thread.join()
