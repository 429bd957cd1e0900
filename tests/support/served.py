"""A tiny model with a chat template, a server of it on a thread of this process, and what a run answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import transformers

from llmpq.checkpoint.model_files import Model
from llmpq.cli.batch import Batch
from llmpq.cli.prompts import read_prompts
from llmpq.runtime.engine import Engine, SamplingParams, Session
from llmpq.serve.app import build_app
from llmpq.serve.ask import Limits, Reader
from llmpq.serve.metrics import Metrics
from llmpq.serve.plan_view import describe
from llmpq.serve.server import Server, bind, url
from llmpq.serve.service import Service
from llmpq.spec import Output, Plan
from tests.support import tiny_models
from tests.support.pipelines import UNIFORM, make_plan

ROOM = 2000  # tokens of prompt and answer
SLOTS = 4
_TEMPLATE = "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
_TEMPLATE += "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
_TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"
KEY = "a key"
CAPACITY = 220
SOON_S = 20.0
USER = {"role": "user", "content": "héllo"}
HALVES = {"129": 100, "104": 100}  # the two bytes of é, in any order
# Bodies as they come, and how many of each: greedy ones of both kinds, streamed and whole.
CHAT = {"messages": [USER], "max_tokens": 20, "temperature": 0}
TEXT = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0}
MIXED: list[dict[str, Any]] = [
    body | {"stream": stream}
    for i in range(5)
    for stream in (False, True)
    for body in (
        CHAT | {"messages": [{"role": "system", "content": "x" * i}, USER], "max_completion_tokens": 9 + 7 * i},
        CHAT | {"logit_bias": HALVES, "frequency_penalty": 2, "max_tokens": 10 + i},
        TEXT | {"prompt": "a long text " * 3**i, "max_tokens": 3 + i},
        TEXT | {"repetition_penalty": 1.2 + i / 10, "frequency_penalty": 0.5},
    )
]
SAMPLED: list[dict[str, Any]] = [
    CHAT | {"temperature": 1.5, "seed": 7, "n": 3, "stop": None},
    CHAT | {"logprobs": True, "top_logprobs": 2},
    TEXT | {"logprobs": 1, "temperature": 0.7, "seed": 5},
]


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
        server = Server(
            build_app(service, reader, lambda: describe(plan_of(model), None), key), service, bound, drain_s
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield url(bound)
        finally:
            server.stop()
            thread.join()


def outputs(engine: Engine, model: Model, bodies: list[dict[str, Any]], folder: Path) -> list[list[Output]]:
    """What `llmpq run` answers to a batch file of these bodies."""
    path = folder / "batch.jsonl"
    path.write_text("\n".join(json.dumps({"body": body}) for body in bodies))
    batch = Batch(read_prompts(str(path)), SamplingParams(), model)
    batch.completions.generate(engine, on_end=batch.answer)
    batch.check()
    return [batch.outputs[i] for i in range(len(bodies))]


class Served:
    """A session that is served, and what a run answered before."""

    def __init__(self, session: Session, url: str, model: Model, answers: list[list[Output]]) -> None:
        self.session, self.url, self.root, self.model = session, url, url.removesuffix("/v1"), model
        self.mixed, self.sampled, (self.long,) = answers[:40], answers[40:43], answers[43]
        self.client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=SOON_S)

    @property
    def name(self) -> str:
        return self.model.spec.name

    def post(self, path: str, body: Any, key: str = KEY) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(self.root + path, content=content, headers=headers, timeout=SOON_S)

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.root}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in samples}
