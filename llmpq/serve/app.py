"""The routes of the server."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from llmpq.runtime.completion import Completion
from llmpq.serve.answer_forms import CHAT, TEXT, Form
from llmpq.serve.ask import Ask, Reader
from llmpq.serve.metrics import Live
from llmpq.serve.refusal import Refusal
from llmpq.serve.reply import Reply
from llmpq.serve.service import Answers, Ended, Service
from llmpq.spec import LlmpqError, UsageError
from llmpq.spec.ranges import shown

MOST_BYTES = 2**23  # of a body
BODY_S = 30.0  # in which it has to come
_LEFT = 499  # nobody reads this status
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # by proxies on the way

_PAGE = Path(__file__).with_name("page.html")
# The page loads nothing, and talks to nobody else.
_PAGE_MAY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)

T = TypeVar("T")


def build_app(service: Service, reader: Reader, plan: Callable[[], dict[str, Any]], api_key: str | None) -> FastAPI:
    """All but /health and the page ask for the key, if there is one. `plan` is what plan_view says of what runs now."""
    app = FastAPI(openapi_url=None)
    _answer_errors(app)
    app.include_router(_open_routes(service))
    app.include_router(_Routes(service, reader, plan).router, dependencies=[Depends(_key_check(api_key))])
    return app


def _key_check(api_key: str | None) -> Callable[[Request], Coroutine[Any, Any, None]]:
    async def check(request: Request) -> None:
        given = request.headers.get("Authorization", "")
        if api_key is not None and not secrets.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong", code="invalid_api_key")

    return check


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        problem = service.problem
        if problem is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "problem": problem}, HTTPStatus.SERVICE_UNAVAILABLE)

    @router.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_bytes(), headers={"Content-Security-Policy": _PAGE_MAY})

    return router


class _Routes:
    """Those that a key may protect."""

    def __init__(self, service: Service, reader: Reader, plan: Callable[[], dict[str, Any]]) -> None:
        self._service, self._reader, self._plan = service, reader, plan
        self._name, self._started = reader.model.spec.name, int(time.time())
        self._reader_thread = ThreadPoolExecutor(1, "reader")  # templates and tokenizers may take seconds
        self.router = router = APIRouter()
        router.get("/plan")(self.plan)
        router.get("/metrics")(self.metrics)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{name:path}")(self.model)
        router.post(CHAT.url)(self.chat)
        router.post(TEXT.url)(self.completions)
        router.post("/v1/embeddings")(self.embeddings)
        router.post("/tokenize")(self.tokenize)

    async def plan(self) -> JSONResponse:
        return JSONResponse(self._plan())

    async def metrics(self) -> PlainTextResponse:
        session = self._service.session
        live = Live(session.kv_tokens, self._plan()["kv_tokens"], session.loads)
        return PlainTextResponse(self._service.metrics.text(live), media_type="text/plain; version=0.0.4")

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> JSONResponse:
        self._check_name(name)
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, self._reader.chat, CHAT)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, self._reader.completion, TEXT)

    async def embeddings(self) -> Response:
        raise Refusal(HTTPStatus.NOT_IMPLEMENTED, f"embeddings are not served; {TEXT.url} and {CHAT.url} are")

    async def tokenize(self, request: Request) -> JSONResponse:
        tokens = await self._read(request, self._reader.tokens)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._reader.limits.room})

    async def _complete(self, request: Request, read: Callable[[dict[str, Any]], Ask], form: Form) -> Response:
        self._service.check_open()  # before time is spent on it
        ask = await self._read(request, read)
        reply = Reply(form, ask, self._name, self._reader.model.tokenizer)
        answers = self._service.submit(ask)
        if ask.stream:
            return _EventStream(answers, ask, reply)
        try:
            completions = await _while_connected(request.receive, answers.all())
        finally:
            answers.cancel()
        return (
            Response(status_code=_LEFT)
            if completions is None
            else JSONResponse(await asyncio.to_thread(reply.whole, completions))
        )

    async def _read(self, request: Request, read: Callable[[dict[str, Any]], T]) -> T:
        """What a body asks for. Raises Refusal and UsageError."""
        with self._service.reading():
            data = await _body(request)
            return await asyncio.get_running_loop().run_in_executor(self._reader_thread, self._parse, data, read)

    def _parse(self, data: bytes, read: Callable[[dict[str, Any]], T]) -> T:
        """On the reader's thread, so that one body at a time is in memory as objects."""
        body = _object(data)
        self._check_name(body.get("model"))
        return read(body)

    def _check_name(self, name: Any) -> None:
        if name is not None and name != self._name:
            message = f"there is no model {shown(name)} here; it serves {self._name}"
            raise Refusal(HTTPStatus.NOT_FOUND, message, code="model_not_found", param="model")

    def _model(self) -> dict[str, Any]:
        room = self._reader.limits.room
        head = {"id": self._name, "object": "model", "created": self._started}
        return {**head, "owned_by": "llmpq", "max_model_len": room}


class _EventStream(StreamingResponse):
    """Answers as server-sent events. When the client leaves, they are cancelled."""

    def __init__(self, answers: Answers, ask: Ask, reply: Reply) -> None:
        super().__init__(_events(answers, ask, reply), headers=_UNBUFFERED, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self.stream_response(send))
        finally:
            self._answers.cancel()


async def _events(answers: Answers, ask: Ask, reply: Reply) -> AsyncIterator[str]:
    for chunk in reply.first():
        yield _event(chunk)
    found: list[Completion] = []
    try:
        async for event in answers:
            if isinstance(event, Ended):
                found += event.completions
                for choice, completion in enumerate(event.completions, event.prompt * ask.sampling.n):
                    for chunk in await asyncio.to_thread(reply.end, choice, completion):
                        yield _event(chunk)
            else:
                for chunk in reply.pieces(event.choice, event.text):
                    yield _event(chunk)
    except Refusal as refusal:
        yield _event(refusal.to_dict())
        return
    for chunk in reply.last(found):
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Do it; None if the client leaves before it is done."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        doing.cancel()
        leaving.cancel()


async def _body(request: Request) -> bytes:
    """What is sent. Raises Refusal."""
    try:
        size, data = await asyncio.wait_for(_received(request), BODY_S)
    except ClientDisconnect:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the connection was closed before the body had come") from None
    except asyncio.TimeoutError:
        raise Refusal(HTTPStatus.REQUEST_TIMEOUT, f"the body has not come within {BODY_S:g} s") from None
    if size > MOST_BYTES:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has {size} bytes, and may have {MOST_BYTES}")
    return data


async def _received(request: Request) -> tuple[int, bytes]:
    """The size of a body, and the body if it is not too large."""
    data, size = bytearray(), 0
    async for part in request.stream():  # to its end: who still sends would not hear that it is too large
        size += len(part)
        if size <= MOST_BYTES:
            data += part
    return size, bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    """The object that a body is. Raises Refusal."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(HTTPStatus.BAD_REQUEST, "the body is no JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, "the body is no JSON object")
    return body


def _answer_errors(app: FastAPI) -> None:
    """Whatever goes wrong is told in OpenAI's form."""

    def answer(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.to_dict(), refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, refusal: Refusal) -> JSONResponse:
        return answer(refusal)

    @app.exception_handler(UsageError)
    async def on_usage(request: Request, error: UsageError) -> JSONResponse:
        return answer(Refusal(HTTPStatus.BAD_REQUEST, str(error)))

    @app.exception_handler(LlmpqError)
    async def on_loss(request: Request, error: LlmpqError) -> JSONResponse:
        return answer(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(error)))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        refusal = Refusal(HTTPStatus(error.status_code), f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(refusal.to_dict(), refusal.status, error.headers)  # which methods are allowed

    @app.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> JSONResponse:
        return answer(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its output says how"))
