"""The options that programs share which put a server under a load."""

from __future__ import annotations

import argparse

from bench.end_to_end import models


def parser_of(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that has them: the model, threads, seconds of arrivals, and where files are written."""
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(models.MODELS), default="qwen")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="in which the requests of a trial come")
    parser.add_argument("--work", metavar="FOLDER", help="where models are written, and kept (default: temporary)")
    parser.add_argument("--json-out", metavar="FILE")
    return parser
