"""`llmpq serve`: plan, load, and answer requests of HTTP in OpenAI's form until it is told to stop."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError, Namespace
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmpq.cli import signals
from llmpq.cli.constraint_options import add_constraints, add_quality
from llmpq.cli.options import add_costs, add_devices, add_model, add_on_loss, read_model
from llmpq.cli.parser import Commands, nonnegative, positive
from llmpq.cli.plan_options import LENGTHS, PlanOptions
from llmpq.report import console
from llmpq.report.progress_bar import progress
from llmpq.report.streams import ERR, OUT
from llmpq.spec import UsageError

if TYPE_CHECKING:
    from llmpq.checkpoint.model_files import Model
    from llmpq.progress import Notify
    from llmpq.serve.server import Server
    from llmpq.spec import Plan, Solved

_BATCH_SIZES = (8, 4, 2)  # the first that has room for the longest conversations
_QUEUE = 256
_DRAIN_S = 30.0
_KEY = "LLMPQ_API_KEY"  # for a key that no list of processes shows
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add(commands: Commands) -> None:
    parser = commands.add_command("serve", execute, "plan, load, and answer requests in OpenAI's form over HTTP")
    add_model(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    server.add_argument("--api-key", metavar="K", help=f"that clients must give (default: {_KEY}, or none)")
    server.add_argument("--max-answer", type=positive, metavar="N", help="most tokens of an answer (default: no limit)")
    server.add_argument(
        "--max-queue", type=positive, default=_QUEUE, metavar="N", help=f"sequences that may wait (default: {_QUEUE})"
    )
    server.add_argument(
        "--drain", type=nonnegative, default=_DRAIN_S, metavar="S", help=f"to end what runs (default: {_DRAIN_S:g})"
    )
    devices = parser.add_argument_group("devices and plan")
    add_devices(devices)
    devices.add_argument("--plan", metavar="FILE", help="serve this plan instead of making one")
    add_on_loss(devices)
    add_costs(devices)
    devices.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of prompt and answer (default: 2048, or what fits)"
    )
    devices.add_argument(
        "--batch-size", type=positive, metavar="N", help="sequences at once (default: 8, or 4 or 2 if so many fit)"
    )
    keep = parser.add_argument_group("what the plan must keep to")
    add_constraints(keep)
    add_quality(keep)


def execute(arguments: Namespace) -> None:
    _check_packages()
    from llmpq.runtime.torchrun import Rank
    from llmpq.serve.app import build_app
    from llmpq.serve.ask import Limits, Reader
    from llmpq.serve.metrics import Metrics
    from llmpq.serve.plan_view import describe
    from llmpq.serve.server import Server, bind, url
    from llmpq.serve.service import Service

    if Rank.current() is not None:
        raise UsageError("llmpq serve starts all stages itself; start it without torchrun, on one host")
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(_KEY)
    if key == "":
        raise UsageError("the API key is empty; leave it out, or give one")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UsageError("the API key is not of printable ASCII, or has spaces around it, which HTTP cannot send")
    options = PlanOptions(arguments)
    if options.given is not None and arguments.batch_size is not None:
        raise UsageError("--plan already decides --batch-size; leave one of them out")
    with ExitStack() as stack:
        bound = stack.enter_context(bind(arguments.host, arguments.port))
        with progress() as notify:
            model = read_model(arguments, notify)
            options.check(model)
            plan, solved = options.given or _made(arguments, options, model, notify)
            OUT.print(console.plan_table(plan, solved))
            OUT.flush()
            metrics = Metrics(plan.slots, None if solved is None else solved.prediction)
            engine = stack.enter_context(
                options.engine(model, plan, notify, on_plan=lambda found: metrics.replanned(found.slots))
            )
        session = stack.enter_context(engine.session(metrics.progress))
        service = Service(session, metrics, plan.slots + arguments.max_queue)
        room = min(plan.max_length, model.spec.max_positions)
        reader = Reader(model, Limits(room, arguments.max_answer, service.capacity))
        app = build_app(service, reader, lambda: describe(engine.plan, None if engine.losses else solved), key)
        _serve(arguments, Server(app, service, bound, arguments.drain), model, url(bound), key)


def _serve(arguments: Namespace, server: Server, model: Model, address: str, key: str | None) -> None:
    """Until a signal comes, or the session has failed."""
    with signals.draining(server.stop):
        if key is None and arguments.host not in _LOOPBACK:
            ERR.print(f"llmpq: whoever reaches {arguments.host} may ask; --api-key gives the server a key")
        ERR.print(f"llmpq: serving {model.spec.name} at {address}", soft_wrap=True)
        server.run()


def _made(arguments: Namespace, options: PlanOptions, model: Model, notify: Notify) -> tuple[Plan, Solved]:
    """A plan for conversations of --max-length tokens, --batch-size of them at once."""
    lengths = LENGTHS if options.max_length is None else [options.max_length]
    sizes = _BATCH_SIZES if arguments.batch_size is None else [arguments.batch_size]
    return options.solve_longest(model, sizes, arguments.max_answer, notify, lengths)


def _check_packages() -> None:
    """Raise UsageError if what the server takes is missing."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(f"serving takes {' and '.join(missing)}; install them with `pip install 'llmpq[serve]'`")


def _port(text: str) -> int:
    """Of TCP; 0 stands for any that is free."""
    if not text.isdecimal() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)
