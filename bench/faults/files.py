"""Mutated files: each goes through its door, which has 2 s to use it, or to refuse it by one line.

A process of its own reads them, so that one which hangs or dies is counted. A file is known by its kind and number:
`python -m bench.faults.files KIND NUMBER SEED` writes it to a new folder and opens it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
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

import numpy as np

import planner
from bench.faults.counts import Counts, Ending
from bench.faults.mutations import Gguf, gguf_string, misplace, mutate_bytes, mutate_json
from llmpq.checkpoint.families import decoder_tensors
from llmpq.checkpoint.model_files import describe, open_model
from llmpq.checkpoint.weights import open_weights
from llmpq.cli.prompts import read_lengths, read_prompts
from llmpq.spec import (
    BITS,
    Cluster,
    Context,
    CostRow,
    CostTable,
    Link,
    LlmpqError,
    ModelSpec,
    Op,
    Plan,
    Precision,
    Prediction,
    Profile,
    Record,
    Sensitivity,
    Solution,
    Solved,
    Workload,
    load_either,
    parse_devices,
    unit_ops,
)

LIMIT_S = 2.0
START_S = 120.0
LONGEST = 500  # characters of a message
EXIT_CODES = (2, 3)

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
_PROMPTS = [f"What is {i} + {i}?" for i in range(8)]
_LENGTHS = [(i, 4) for i in range(1, 9)]
_EACH: dict[str, dict[bytes, Any]] = {  # line -> what is read of it
    "prompts": {json.dumps({"prompt": prompt}).encode(): prompt for prompt in _PROMPTS},
    "lengths": {json.dumps({"prompt_len": m, "output_len": n}).encode(): (m, n) for m, n in _LENGTHS},
}


@dataclass(frozen=True)
class Kind:
    """One kind of file: where its original lies in the folder of originals, how it is damaged and read."""

    name: str
    file: str
    mutate: Callable[[Random, bytes], bytes]
    read: Callable[[Path], object]  # of the folder


# ---- originals ----


def _tensors() -> dict[str, np.ndarray[Any, Any]]:
    hidden, up, kv, vocab = 32, 64, 16, 260
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (up, hidden),
        "mlp.up_proj": (up, hidden),
        "mlp.down_proj": (hidden, up),
    }
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    numbers = np.random.default_rng(0)
    return {f"{name}.weight": numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _gguf() -> Gguf:
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 16,
    }
    reals = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500.0}
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "the"]
    metadata = (
        (b"general.architecture", 8, gguf_string(b"llama")),
        *((f"llama.{name}".encode(), 4, struct.pack("<I", size)) for name, size in sizes.items()),
        *((f"llama.{name}".encode(), 6, struct.pack("<f", real)) for name, real in reals.items()),
        (b"tokenizer.ggml.model", 8, gguf_string(b"gpt2")),
        (b"tokenizer.ggml.tokens", *_strings(tokens)),
        (b"tokenizer.ggml.merges", *_strings(["t h", "th e"])),
        (b"tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 0)),
        (b"tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 1)),
        (b"tokenizer.chat_template", 8, gguf_string(_TEMPLATE.encode())),
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors, data = [], bytearray()
    for name, tensor in _tensors().items():
        stored = f"{names.get_name(name.removesuffix('.weight'))}.weight".encode()
        tensors.append((stored, tensor.shape[::-1], 0, len(data)))
        data += tensor.tobytes()
        data += bytes(-len(data) % 32)
    return Gguf(metadata, tuple(tensors), bytes(data))


def _strings(texts: Sequence[str]) -> tuple[int, bytes]:
    """An array of a GGUF file's metadata."""
    return 9, struct.pack("<IQ", 8, len(texts)) + b"".join(gguf_string(text.encode()) for text in texts)


def _write_model(folder: Path) -> None:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    save_file(_tensors(), folder / "model.safetensors", {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    _flat_template(folder)


def _flat_template(folder: Path) -> None:
    """The template within tokenizer_config.json, so that mutations of that file meet it."""
    template = folder / "chat_template.jinja"
    if template.exists():
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template.read_text()}))
        template.unlink()


def problem(spec: ModelSpec) -> planner.Problem:
    """A small problem of two devices, whose costs and sensitivities are made up."""
    cluster = parse_devices("cpu:name=a,memory=4MiB;cpu:name=b,memory=4MiB")
    workload = Workload(2, 8, 4)
    precisions = [Precision(bits, None if bits == 16 else 32) for bits in BITS]
    ops = {Op("step")}
    for unit in spec.distinct_units:
        for precision in precisions:
            for tokens in (1, 64):
                for keys in (1, 64):
                    ops.update(unit_ops(spec, unit, precision, "a8x2", tokens, tokens, Context.of(keys)))
    rows = tuple(CostRow(op, 1e-6 * (op.m + op.n / 99), "cpu", "float32", 0) for op in sorted(ops, key=str))
    tables = {name: CostTable(name, "none", 1, None, 2**20, rows) for name in ("a", "b")}
    profile = Profile(tables, (Link("a", "b", 1e-4, 1e9), Link("b", "a", 1e-4, 1e9)))
    omega = {unit: {str(precision): 1 / precision.bits for precision in precisions[:-1]} for unit in spec.units}
    sensitivity = Sensitivity(spec.name, spec.content_hash, "variance", "none", omega)
    constraints = planner.Constraints(time_limit_s=1.0)
    return planner.Problem(spec, cluster, workload, profile, sensitivity, constraints)


def write_originals(folder: Path) -> None:
    """Every file in `folder` as it is without damage."""
    _write_model(folder / "model")
    (folder / "model.gguf").write_bytes(_gguf().encode())
    spec = open_model(str(folder / "model")).spec
    small = problem(spec)
    for name, record in {"cluster": small.cluster, "costs": small.profile, "sensitivity": small.sensitivity}.items():
        record.save(folder / f"{name}.json")
    plan = Plan.single(spec, small.cluster.devices[0], Precision(4, 32), slots=2, max_length=12)
    plan.save(folder / "plan.json")
    solved = Solved(plan, Prediction(1.0, 1.0, 4.0, (2**20,)), Solution("HiGHS", 2.0, 2.0, 0.1, 1.0, 2.0))
    solved.save(folder / "solved.json")
    for name, lines in _EACH.items():
        (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


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
    return mutate_bytes(random, data, 8000) if random.random() < 0.3 else _gguf().mutated(random)


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
        for line, record in _EACH[name].items():
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
