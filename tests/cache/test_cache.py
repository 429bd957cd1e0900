"""The cache: what is found is what was kept, whatever happens to its files and to those who write them."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpq import cache
from llmpq.progress import warn_once
from llmpq.spec import Link, UsageError

FILES = {"a.bin": bytes(range(256)) * 9000, "below/b.bin": b"", "c.txt": b"text"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the kind "things", in a cache of its own, of which nothing was said yet."""
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "things"
    forget()


def forget() -> None:
    warn_once.cache_clear()
    cache._tidy.cache_clear()
    cache._make_room.cache_clear()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the user was told."""
    return lambda: caplog.messages


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def keep() -> None:
    cache.keep("things", "key", write)


def find() -> dict[str, bytes] | None:
    return cache.find("things", "key", read)


def entries(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


WHOLE = {".tmp", "key", "key/below", *(f"key/{name}" for name in (*FILES, "manifest.json"))}


def test_what_was_kept_is_found_and_nothing_else_is_left(place: Path, said: Callable[[], list[str]]) -> None:
    assert find() is None
    keep()
    assert find() == FILES
    assert cache.find("things", "other", read) is None and cache.find("others", "key", read) is None
    assert entries(place) == WHOLE
    assert not said()


def test_a_later_result_takes_the_place_of_an_earlier_one(place: Path) -> None:
    first, second = Link("a", "b", 1.0, 2.0), Link("a", "b", 3.0, 4.0)
    cache.keep_record("things", "key", first)
    assert cache.find_record("things", "key", Link) == first
    cache.keep_record("things", "key", second)
    assert cache.find_record("things", "key", Link) == second
    assert len(entries(place)) == 4


def test_beyond_the_limit_what_was_used_longest_ago_goes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = 3600
    for key, age in {"oldest": 5 * hour, "found": 9 * hour, "older": 3 * hour, "lately": hour // 2}.items():
        cache.keep("things", key, lambda folder: (folder / "file").write_bytes(bytes(2**20)))
        used = time.time() - age
        os.utime(place / key / "manifest.json", (used, used))
    assert cache.find("things", "found", lambda folder: (folder / "file").stat().st_size) == 2**20
    for limit, left in {"1": 4, "0.003": 3, "0.0025": 2, "0": 2}.items():
        monkeypatch.setenv("LLMPQ_CACHE_GIB", limit)
        forget()
        cache.keep("others", "key", lambda folder: (folder / "file").write_bytes(b""))
        assert len(entries(place) & {"oldest", "found", "older", "lately"}) == left
    assert {"found", "lately"} <= entries(place)
    assert not list((place / ".tmp").iterdir())


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("LLMPQ_CACHE_GIB", limit)
    with pytest.raises(UsageError, match=f"LLMPQ_CACHE_GIB is '{limit}'"):
        keep()


def to_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zeroed": lambda entry: (entry / "a.bin").write_bytes(bytes(len(FILES["a.bin"]))),
    "half": lambda entry: os.truncate(entry / "a.bin", len(FILES["a.bin"]) // 2),
    "grown": lambda entry: (entry / "below/b.bin").write_bytes(b"x"),
    "swapped": lambda entry: (entry / "c.txt").replace(entry / "a.bin"),
    "removed": lambda entry: (entry / "below/b.bin").unlink(),
    "added": lambda entry: (entry / "more").write_text(""),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "half a manifest": lambda entry: os.truncate(entry / "manifest.json", 20),
    "empty manifest": lambda entry: (entry / "manifest.json").write_text("{}"),
    "another manifest": lambda entry: (entry / "manifest.json").write_text('{"a.bin": null}'),
    "no text": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest is a folder": lambda entry: ((entry / "manifest.json").unlink(), (entry / "manifest.json").mkdir()),
    "file": to_file,
    "dangling link": lambda entry: (shutil.rmtree(entry), entry.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_said_once_and_made_anew_once(
    damage: str, place: Path, said: Callable[[], list[str]]
) -> None:
    keep()
    cache.keep("things", "another", write)
    for entry in (place / "key", place / "another"):
        DAMAGE[damage](entry)
    assert find() is None and cache.find("things", "another", read) is None
    (line,) = said()
    assert line == f"the cache {place.parent} holds damaged results; they are made anew"
    keep()
    cache.keep("things", "another", write)
    assert find() == cache.find("things", "another", read) == FILES
    assert entries(place) == WHOLE | {name.replace("key", "another") for name in WHOLE}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*FILES, "manifest.json"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_every_changed_byte_shows(place: Path, name: str, where: float, change: int) -> None:
    keep()
    path = place / "key" / name
    content = bytearray(path.read_bytes())
    if content:
        content[int(where * len(content))] ^= change
    path.write_bytes(content)
    found = find()
    # A space in the manifest may have become another one.
    assert found is None or (found == FILES and (not content or name == "manifest.json"))


def test_what_cannot_be_understood_is_damaged(place: Path, said: Callable[[], list[str]]) -> None:
    cache.keep("things", "key", lambda folder: (folder / "record.json").write_text("[]"))
    assert cache.find_record("things", "key", Link) is None
    assert len(said()) == 1


def test_an_error_in_making_a_result_leaves_nothing(place: Path, said: Callable[[], list[str]]) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        cache.keep("things", "key", fail)
    assert entries(place) == {".tmp"} and find() is None and not said()


def test_a_full_disk_is_one_line_and_leaves_nothing(place: Path, said: Callable[[], list[str]]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        keep()
        keep()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = said()
    assert line.startswith(f"cannot write the cache {place.parent}: File too large; going on without it.")
    assert entries(place) == {".tmp"} and find() is None


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """root may write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with a result that others may read, and not write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("LLMPQ_CACHE", folder)
        keep()
        os.chmod(Path(folder, "things"), 0o555)
        os.chmod(Path(folder, "things", ".tmp"), 0o555)
        yield Path(folder)
        os.chmod(Path(folder, "things"), 0o755)
        os.chmod(Path(folder, "things", ".tmp"), 0o755)


def test_a_cache_that_can_only_be_read_is_read(shared: Path, unprivileged: None, said: Callable[[], list[str]]) -> None:
    assert find() == FILES and not said()
    cache.keep("things", "new", write)
    cache.keep("things", "newer", write)
    (line,) = said()
    assert line.startswith(f"cannot write the cache {shared}: Permission denied; going on without it.")
    assert cache.find("things", "new", read) is None


def test_a_cache_that_cannot_even_be_read_is_done_without(
    shared: Path, unprivileged: None, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", "/proc/1/cache")
    assert find() is None
    keep()
    assert len(said()) == 1


def test_others_may_use_a_result_as_the_umask_allows(place: Path) -> None:
    before = os.umask(0o027)
    try:
        keep()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in place.rglob("*") if path.is_dir()} == {0o750}
    assert {path.stat().st_mode & 0o777 for path in place.rglob("*") if path.is_file()} == {0o640}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"LLMPQ_CACHE": "~/mine", "HOME": "/h"}, "/h/mine"),
        ({"LLMPQ_CACHE": "mine"}, "{here}/mine"),
        ({"LLMPQ_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/llmpq"),
        ({"LLMPQ_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/llmpq"),
        ({"LLMPQ_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"LLMPQ_CACHE": "~no-such-user/c"}, None),
        ({"LLMPQ_CACHE": ""}, None),
    ],
    ids=str,
)
def test_where_the_cache_is(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LLMPQ_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is not None:
        assert cache.folder() == Path(expected.format(here=Path.cwd()))
        return
    assert cache.folder() is None and find() is None
    keep()
    assert said() == ["there is no home folder to keep a cache in; going on without one. Set LLMPQ_CACHE to a folder"]


WRITER = """
import sys, time
from pathlib import Path
from llmpq import cache

def write(folder):
    (folder / "half").write_text("half of it")
    print("writing", flush=True)
    time.sleep(60)

cache.keep("things", sys.argv[1], write)
"""


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(place: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, key], stdout=subprocess.PIPE, text=True)
        for key in ("dead", "stopped", "alive")
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        dead, stopped, _ = writers
        stopped.send_signal(signal.SIGSTOP)
        dead.kill()
        dead.wait()
        assert len(list(place.glob(".tmp/*/new/half"))) == 3
        assert find() is None  # as every start does
        assert len(list(place.glob(".tmp/*/new/half"))) == len(list(place.glob(".tmp/*.lock"))) == 2
        keep()
        assert find() == FILES and len(list(place.glob(".tmp/*/new/half"))) == 2
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    forget()
    assert find() == FILES
    assert entries(place) == WHOLE


SHARER = """
import logging, sys
from pathlib import Path
from llmpq import cache

own = sys.argv[1].encode() * 300_000

def read(folder):
    return (folder / "content").read_bytes()

found = set()
for i in range(int(sys.argv[2])):
    cache.keep("things", "key", lambda folder: (folder / "content").write_bytes(own))
    content = cache.find("things", "key", read)
    if content is not None:  # it is not there for a moment, while another takes its place
        assert len(content) == len(own) and len(set(content)) == 1, content[:9]
        found.add(content[0])
assert found
"""


def test_two_processes_that_write_one_result_at_the_same_time_both_find_a_whole_one(place: Path) -> None:
    sharers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARER, name, "150"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    outputs = [sharer.communicate(timeout=120) for sharer in sharers]
    assert [sharer.returncode for sharer in sharers] == [0, 0], outputs
    assert [error for _, error in outputs] == ["", ""]
    assert entries(place) == {".tmp", "key", "key/content", "key/manifest.json"}


HOMELESS = """
import os, pwd

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
import planner, transformers
from llmpq import cache
assert cache.folder() is None and "HOME" not in os.environ
"""


def test_what_is_imported_needs_no_home_folder() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "LLMPQ_CACHE")}
    result = subprocess.run([sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
