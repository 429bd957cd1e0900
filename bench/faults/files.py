"""Mutated files: each goes through its door, which has 2 s to use it, or to refuse it by one line.

A process of its own reads them, so that one which hangs or dies is counted. A file is known by its kind and number:
`python -m bench.faults.files KIND NUMBER SEED` writes it to a new folder and opens it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import planner
from bench.faults.counts import Counts, Ending
from bench.faults.mutations import misplace, mutate_bytes, mutate_json
from bench.faults.originals import EACH, gguf_model, problem, write_originals
from llmpq.checkpoint.model_files import describe, open_model
from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.checkpoint.weights import open_weights
from llmpq.cli.prompts import read_lengths, read_prompts
from llmpq.spec import (
    Cluster,
    LlmpqError,
    Plan,
    Profile,
    Record,
    Sensitivity,
    Solved,
    load_either,
)

LIMIT_S = 2.0
START_S = 120.0
LONGEST = 500  # characters of a message
EXIT_CODES = (2, 3)


@dataclass(frozen=True)
class Kind:
    """One kind of file: where its original lies in the folder of originals, how it is damaged and read."""

    name: str
    file: str
    mutate: Callable[[Random, bytes], bytes]
    read: Callable[[Path], object]  # of the folder


# ---- damage ----


def _json(random: Random, data: bytes) -> bytes:
    return mutate_bytes(random, data) if random.random() < 0.3 else mutate_json(random, json.loads(data))


def _jsonl(random: Random, data: bytes) -> bytes:
    """One line of several."""
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = _json(random, lines[at])
    return b"\n".join(lines) + b"\n"


def _safetensors(random: Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.4:
        return mutate_bytes(random, data, 8 + size)
    header = mutate_json(random, json.loads(data[8 : 8 + size]))
    size = len(header) if random.random() < 0.9 else random.choice((0, 2, 2**31, 2**63, len(header) - 1))
    return size.to_bytes(8, "little") + header + data[8 + size :]


def _gguf_file(random: Random, data: bytes) -> bytes:
    return mutate_bytes(random, data, 8000) if random.random() < 0.3 else gguf_model().mutated(random)


# ---- doors ----


class Lost(Exception):
    """Something of what a file holds is not in what was read of it."""


class Doubled(Exception):
    """More was read of a file than it holds."""


def _read_lines(name: str, read: Callable[[str], Sequence[Any]]) -> Callable[[Path], object]:
    """Each line that is not damaged is read once, if the file is read at all."""

    def each_once(folder: Path) -> object:
        path = folder / f"{name}.jsonl"
        records = read(str(path))
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        if len(records) > len(lines):
            raise Doubled(f"{len(records)} of {len(lines)} lines")
        for line, record in EACH[name].items():
            if lines.count(line) > records.count(record):
                raise Lost(f"{record!r} of line {line!r}")
        return records

    return each_once


def _open(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        model = open_model(str(folder / name))
        weights = open_weights(model.checkpoint, model.spec)
        family = describe(model.checkpoint).family
        return sum(len(list(weights.rows(*part))) for part in decoder_tensors(model.spec, family))

    return read


def _tokenize(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        tokenizer = open_model(str(folder / name)).tokenizer
        return tokenizer.encode("Hello"), tokenizer.decode(tokenizer.encode_chat("Hello\nworld"))

    return read


def _plan_with(name: str, kind: type[Record]) -> Callable[[Path], object]:
    """Plan with the damaged file and the originals of the others."""

    def read(folder: Path) -> object:
        given = kind.load(folder / f"{name}.json")
        known = problem(open_model(str(folder / "model")).spec)
        field = {Cluster: "cluster", Profile: "profile", Sensitivity: "sensitivity"}[kind]
        return planner.solve(planner.Problem(**{**vars(known), field: given}))

    return read


def _check_plan(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        loaded = load_either(folder / f"{name}.json", Solved, Plan)
        plan = loaded.plan if isinstance(loaded, Solved) else loaded
        plan.check_model(open_model(str(folder / "model")).spec)
        return plan

    return read


def _prompts(source: str) -> list[str]:
    """The text of each, or why it has none."""
    return [prompt.text if prompt.error is None else prompt.error for prompt in read_prompts(source)]


def _lengths(source: str) -> list[tuple[int, int]]:
    return read_lengths(source, lambda prompt, answer: (len(prompt), len(answer)), 64)


KINDS = (
    Kind("plan", "plan.json", _json, _check_plan("plan")),
    Kind("solved plan", "solved.json", _json, _check_plan("solved")),
    Kind("cluster", "cluster.json", _json, _plan_with("cluster", Cluster)),
    Kind("costs", "costs.json", _json, _plan_with("costs", Profile)),
    Kind("sensitivity", "sensitivity.json", _json, _plan_with("sensitivity", Sensitivity)),
    Kind("configuration", "model/config.json", _json, _open("model")),
    Kind("safetensors", "model/model.safetensors", _safetensors, _open("model")),
    Kind("GGUF", "model.gguf", _gguf_file, _open("model.gguf")),
    Kind("GGUF tokenizer", "model.gguf", _gguf_file, _tokenize("model.gguf")),
    Kind("tokenizer", "model/tokenizer.json", _json, _tokenize("model")),
    Kind("tokenizer configuration", "model/tokenizer_config.json", _json, _tokenize("model")),
    Kind("prompts", "prompts.jsonl", _jsonl, _read_lines("prompts", _prompts)),
    Kind("lengths", "lengths.jsonl", _jsonl, _read_lines("lengths", _lengths)),
)


# ---- one file ----


def damage(folder: Path, kind: Kind, number: int, seed: int) -> None:
    """Damage the file of a kind in a folder of originals."""
    random = Random(f"{seed} {kind.name} {number}")
    path = folder / kind.file
    if random.random() < 0.02:
        misplace(random, path)
    else:
        path.write_bytes(kind.mutate(random, path.read_bytes()))


def ending_of(read: Callable[[], object]) -> tuple[Ending, str]:
    """How the reading of a file ends, and in which words."""
    try:
        read()
    except Lost as error:
        return "lost", str(error)
    except Doubled as error:
        return "doubled", str(error)
    except LlmpqError as error:
        message = str(error)
        if error.exit_code not in EXIT_CODES:
            return "tracebacks", f"exit code {error.exit_code}: {message}"
        if len(message) > LONGEST or not message.isprintable():
            return "tracebacks", f"{len(message)} characters: {message[:LONGEST]!r}"
        return "ended_well", message
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return "tracebacks", f"{type(error).__name__}: {str(error)[:200]!r} in {Path(at.filename).name}:{at.lineno}"
    return "ended_well", "read"


def _serve(originals: str, pipe: Connection) -> None:
    """The process that reads: answers each (index of a kind, number, seed) by how it ended."""
    os.environ["LLMPQ_CACHE"] = str(Path(originals).with_name("cache"))
    for kind in KINDS:
        kind.read(Path(originals))  # undamaged, so all are read; and what is imported for them is there
    with tempfile.TemporaryDirectory() as place:
        pipe.send(None)
        while (task := pipe.recv()) is not None:
            index, number, seed = task
            folder = Path(place) / "files"
            shutil.copytree(originals, folder)
            damage(folder, KINDS[index], number, seed)
            pipe.send(None)
            pipe.send(ending_of(lambda folder=folder, read=KINDS[index].read: read(folder)))  # type: ignore[misc]
            shutil.rmtree(folder)


class _Reader:
    """A process that reads damaged files; started anew when one has hung or died."""

    def __init__(self, originals: Path) -> None:
        self._originals = originals
        self._process: BaseProcess | None = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(str(self._originals), theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(START_S)

    def _receive(self, limit_s: float) -> Any:
        if not self._pipe.poll(limit_s):
            raise TimeoutError
        return self._pipe.recv()

    def read(self, index: int, number: int, seed: int, limit_s: float) -> tuple[Ending, str]:
        if self._process is None:
            self._start()
        try:
            self._pipe.send((index, number, seed))
            self._receive(START_S)  # the damaged file is there
            ending: tuple[Ending, str] = self._receive(limit_s)
            return ending
        except TimeoutError:
            self.close()
            return "hung", f"more than {limit_s:g} s"
        except (EOFError, OSError):
            process = self._process
            self.close()
            return "tracebacks", f"the process died: {process and process.exitcode}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
            self._pipe.close()


def inject(seed: int, count: int) -> list[Counts]:
    """Damage `count` files, as many of each kind, and read them."""
    counts = [Counts(f"damaged {kind.name}") for kind in KINDS]
    with tempfile.TemporaryDirectory() as place:
        originals = Path(place) / "originals"
        originals.mkdir()
        write_originals(originals)
        reader = _Reader(originals)
        try:
            for index, number in _tasks(count):
                ending, what = reader.read(index, number, seed, LIMIT_S)
                if ending == "hung":  # once more, as a machine that does other things may have been slow
                    ending, what = reader.read(index, number, seed, LIMIT_S)
                counts[index].add(ending, f"{KINDS[index].name!r} {number} {seed}: {what}")
        finally:
            reader.close()
    return counts


def _tasks(count: int) -> Iterator[tuple[int, int]]:
    """(index of the kind, number), kinds one after the other."""
    for index in range(len(KINDS)):
        for number in range(index, count, len(KINDS)):
            yield index, number // len(KINDS)


def main(name: str, number: int, seed: int) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    folder = Path(tempfile.mkdtemp())
    write_originals(folder)
    damage(folder, kind, number, seed)
    print(folder / kind.file)
    print(kind.read(folder))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
