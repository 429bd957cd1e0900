"""Where results that are slow to make are kept between runs: tokenizers, quantized weights, cost tables, sensitivities.

Everything here can be deleted at any time. The place is $LLMPQ_CACHE, else $XDG_CACHE_HOME/llmpq, else ~/.cache/llmpq.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpq.spec import UsageError


def cache_path(kind: str, key: str) -> Path:
    """The file or folder that holds `key` among the results of one kind. It may not exist; its parent does.

    Raises UsageError if there can be no such parent.
    """
    base = os.environ.get("LLMPQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmpq"
    folder = Path(base) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write the cache {folder}: {error.strerror}; set LLMPQ_CACHE to a folder that can be written"
        ) from None
    return folder / key


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, so that readers see all of it or nothing.

    If another process was first, its result stays.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)
