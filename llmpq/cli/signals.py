"""Signals that ask a command to end. All do what Ctrl-C does: an exception ends workers and removes folders on its way.

A library that computes, or that swallows the exception, may hold that up; a thread ends the process some seconds later.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_GRACE_S = 5.0  # for the exception to arrive at the top
_EXIT_S = 2.0  # for what is left to clean up without it


class Signalled(KeyboardInterrupt):
    """A signal has asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def raised() -> Iterator[None]:
    """In the block, the first signal raises Signalled, but for those that were ignored before, as nohup does.

    Whatever leaves the block as an exception then is Signalled: the effect of it, or of a terminal that is gone.
    Python lets only the main thread have signals; in others, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _NUMBERS if signal.getsignal(number) in ours}

    signalled: list[Signalled] = []

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        signalled.append(Signalled(number))
        raise signalled[0]

    arrived, arriving = os.pipe()
    os.set_blocking(arriving, False)
    threading.Thread(target=_insist, args=(arrived, set(before)), name="signals", daemon=True).start()
    old = signal.set_wakeup_fd(arriving, warn_on_full_buffer=False)
    try:
        for number in before:
            signal.signal(number, end)
        yield
    except BaseException:
        if signalled:
            raise signalled[0] from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old)
        os.close(arriving)


@contextmanager
def interrupting(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """In the block, in the main thread, Ctrl-C calls `on_interrupt`, and does nothing else.

    Without the wakeup descriptor nobody ends the process for it some seconds later.
    """
    ours = lambda number, frame: on_interrupt()  # noqa: E731  a name, by which it is known again
    awakened = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGINT, ours)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is ours:  # else another signal has come: see `raised`
            signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(awakened, warn_on_full_buffer=False)


@contextmanager
def draining(on_first: Callable[[], None]) -> Iterator[None]:
    """In the block, in the main thread, the first SIGTERM or Ctrl-C calls `on_first`; the next one is as without it.

    Those that were ignored before stay ignored.
    """
    awakened = signal.set_wakeup_fd(-1)  # else the process would be ended some seconds later
    asked = (signal.SIGTERM, signal.SIGINT)
    before = {number: handler for number in asked if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def first(number: int, frame: FrameType | None) -> None:
        restore()
        on_first()

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is first:  # else another signal has come: see `raised`
                signal.signal(number, handler)
        signal.set_wakeup_fd(awakened, warn_on_full_buffer=False)

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()


def _insist(arrived: int, numbers: set[signal.Signals]) -> None:
    """End the process if it has not ended, or left the block, some time after a signal has arrived."""
    done = threading.Event()
    while data := os.read(arrived, 1):
        if data[0] in numbers:
            threading.Thread(target=_end, args=(data[0], done), name="end", daemon=True).start()
    done.set()
    os.close(arrived)


def _end(number: int, done: threading.Event) -> None:
    if done.wait(_GRACE_S):
        return
    print(f"llmpq: {Signalled(number)}", file=sys.stderr)
    leaving = threading.Thread(target=atexit._run_exitfuncs, daemon=True)  # workers and temporary folders
    leaving.start()
    leaving.join(_EXIT_S)
    os._exit(Signalled(number).exit_code)
