"""Files that are not what they seem: each is said to be what it is, in one line, at once."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.weights import open_weights
from llmpq.spec import UsageError
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import save_model


def refusal(path: Path | str) -> str:
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        model = open_model(str(path))
        open_weights(model.checkpoint, model.spec)
    assert time.monotonic() - started < 2
    message = str(caught.value)
    assert len(message) <= 500 and message.isprintable()
    return message


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    *metadata: tuple[str, int, bytes], tensors: tuple[tuple[str, tuple[int, ...], int, int], ...] = (), order: str = "<"
) -> bytes:
    """A GGUF header of (key, type, value as stored) and (name, shape, type, offset), and 256 bytes of data."""
    out = struct.pack(f"{order}4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, kind, value in metadata:
        out += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32 + 256)


def numbers(kind: int, count: int) -> bytes:
    """The beginning of a list."""
    return struct.pack("<IQ", kind, count)


U32 = 4
ALIGNMENT = "general.alignment"
A, B = ("a.weight", (8,), 0, 0), ("b.weight", (8,), 0, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(order=">"), "is a big-endian GGUF file; convert it"),
        (header((ALIGNMENT, U32, struct.pack("<I", 0))), "general.alignment = 0 is no power of two"),
        (header((ALIGNMENT, U32, struct.pack("<I", 24))), "general.alignment = 24 is no power of two"),
        (header((ALIGNMENT, 8, text("32"))), "general.alignment = '32' is no power of two"),
        (header(("a", 99, b"")), "'a': there is no type 99"),
        (header(("a", 9, numbers(9, 1) * 10_000 + numbers(4, 0))), "'a': lists of lists are not read"),
        (header(("a", 9, numbers(4, 2**60))), f"'a': a list has {2**60} entries"),
        (header(("a", 9, numbers(8, 2**60))), f"'a': a list has {2**60} entries"),
        (header(("a", 9, numbers(12, 2**21))), "its header goes on behind its end"),
        (header(("a", 8, struct.pack("<Q", 2**60))), f"'a': a string has {2**60} bytes"),
        (header(("a", 8, struct.pack("<Q", 2**20))), "its header goes on behind its end"),
        (header(("a", 9, numbers(8, 1) + struct.pack("<Q", 2**63))), "its header goes on behind its end"),
        (header(("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")), "'a': 'utf-8' codec can't decode"),
        (header(("a", 7, b"\1"), ("a", 7, b"\1")), "'a' comes twice"),
        (header(tensors=(A, A)), "the tensors a.weight and a.weight overlap"),
        (header(tensors=(A, ("a.weight", (8,), 0, 32))), "has the tensor a.weight twice"),
        (header(tensors=(A, B, ("c.weight", (8,), 0, 60))), "the tensors b.weight and c.weight overlap"),
        (header(tensors=(("a", (8,) * 5, 0, 0),)), "'a' has 5 dimensions"),
        (header(tensors=(("a", (2**40, 2**40), 0, 0),)), "is truncated"),
        (header(tensors=(("a", (8,), 0, 2**63),)), "is truncated"),
        (header(tensors=(("a", (33, 2), 8, 0),)), "rows of 33 are no whole blocks of Q8_0, as a has"),
        (header(tensors=(("a", (8,), 77, 0),)), "m.gguf: 'a' is of GGUF type 77, which is not known"),
        (
            header(tensors=(("a", (8,), 31, 0),)),
            "m.gguf: 'a' is of GGUF type 31, which is not known (31 to 33 are Q4_0_4_4",
        ),
        (header(), "architecture None is not known"),
        (header(("general.architecture", 8, text("x" * 10**6))), "is not known; there are llama"),
        (header(("general.architecture", 8, text("\x1b[2J"))), "is not known; there are llama"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_gguf_headers_that_make_no_sense_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    assert message in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize("general_type", ["adapter", "mmproj"])
def test_gguf_files_that_are_no_model_are_refused(general_type: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={"general.type": general_type})
    assert f"general.type = '{general_type}'; it is no model by itself" in refusal(tmp_path / "m.gguf")


def test_types_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, types={})
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_down.weight") + 21 + 4 + 2 * 8  # behind name, number of dimensions, and those
    path.write_bytes(data[:at] + struct.pack("<I", 26) + data[at + 4 :])
    assert "mlp.down_proj.weight is stored as I32, which is not read" in refusal(path)


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change the header of a safetensors file."""

    def edit(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return edit


NORM = "model.norm.weight"
NONSENSE = f"shape and offsets of {NORM!r}"
_TWICE = f'{{"{NORM}": {{}}, "{NORM}": {{}}}}'.encode()
_DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit(lambda header: header[NORM].update(data_offsets=[0, 192])), "overlap"),
        (_edit(lambda header: header[NORM].update(data_offsets=[192, 0])), NONSENSE),
        (
            _edit(lambda header: header[NORM].update(data_offsets=[0, 1e999])),
            NONSENSE,
        ),
        (_edit(lambda header: header[NORM].update(shape=[-48])), NONSENSE),
        (_edit(lambda header: header[NORM].update(shape=[2**70])), "is broken"),
        (_edit(lambda header: header[NORM].pop("dtype")), "its header is not that of a safetensors file"),
        (_edit(lambda header: header.update({NORM: 5})), "its header is not that of a safetensors file"),
        (lambda data: len(_TWICE).to_bytes(8, "little") + _TWICE, f"an object has the key '{NORM}' twice"),
        (lambda data: len(_DEEP).to_bytes(8, "little") + _DEEP, "its header is not that of a safetensors file"),
    ],
)
def test_safetensors_headers_that_make_no_sense_are_refused(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, "llama-gqa")
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "is not JSON that can be read: it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit (4300 digits)"),
        (b'{"a": "\xff"}', "is not JSON: not text in utf-8 from byte 7 on"),
        (b'{"model_type": "llama", "model_type": "opt"}', "an object has the key 'model_type' twice"),
        (b'{"architectures": 16}', "the architecture '16' is not known"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "no 'num_hidden_layers'"),
        (b'{"architectures": ["%s"]}' % (b"x" * 10**6), "is not known; there are LlamaForCausalLM"),
    ],
    ids=range(7),
)
def test_configurations_that_make_no_sense_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    (tmp_path / "config.json").write_bytes(data)
    assert message in refusal(tmp_path)


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_model(str(tmp_path)).spec.num_layers == 3


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    save_model(tmp_path, "llama-gqa")
    yield tmp_path


def test_links_to_nowhere_are_named(folder: Path) -> None:
    nowhere = folder / "nowhere"
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(nowhere)
        assert f"{name} is a link to" in refusal(folder)
    (folder / "m.gguf").symlink_to(nowhere)
    assert f"m.gguf is a link to {nowhere}, which is not there" in refusal(folder / "m.gguf")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + ".gguf", "a\0b", "~nobody-of-this-name/m", "", "\x1b[2J"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    assert "there is no model" in refusal(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_what_is_no_file_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == "generation_config.json":
        assert open_model(str(folder)).spec.num_layers == 3
    else:
        refusal(folder)


def test_files_that_may_not_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.open

    def denied(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    assert "model.safetensors: Permission denied" in refusal(folder)


def test_a_rust_librarys_panic_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):  # as pyo3 raises them
        pass

    def panics(*arguments: Any) -> Any:
        raise Panic("index out of\nbounds")

    monkeypatch.setattr("llmpq.checkpoint.model_files.safetensors_index", panics)
    assert "cannot be read as a model: index out of bounds" in refusal(folder)
    monkeypatch.setattr("llmpq.checkpoint.model_files.safetensors_index", lambda path: (_ for _ in ()).throw(Panic()))
    assert "cannot be read as a model: Panic" in refusal(folder)
