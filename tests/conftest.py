"""What all tests share: seeds, which of them run, threads and a cache, and a fixture that runs a test on every backend.

`make test` runs all but those marked `full`, `make test-full` all, and `make check` a few cases of each test in the
folders that tests/changed.py names, without those marked `slow`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Tests that run side by side share the processors. torch reads this when it is imported, and so do programs that
    # tests start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run interpreted. Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llmpq.kernels import BACKENDS
from llmpq.kernels.registry import load
from llmpq.progress import warn_once
from tests.support.interpreter import round_to_bfloat16, stay_interpreted
from tests.support.target import Target, require_backend

if not torch.cuda.is_available():
    round_to_bfloat16()
    stay_interpreted()

settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("few", max_examples=5, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=1000, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="at most N cases of each test, spread over all it has")
    parser.addoption("--families-out", type=Path, metavar="FILE", help="what tests marked `family` have shown, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.families_out:
        from tests.support.family_record import FamilyRecord

        config.pluginmanager.register(FamilyRecord(config.option.families_out), "families")


def _is_left_out(item: pytest.Item, markers: str) -> bool:
    """Whether it is marked `full` and that is not asked for, or is a product in a mode that its backend lacks."""
    if item.get_closest_marker("full") and "full" not in markers:
        return True
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    case = parameters.get("case")
    activations = parameters.get("activations") if case is None else getattr(case, "activations", None)
    if "target" not in parameters or ("precision" not in parameters and case is None) or activations is None:
        return False
    backend = load(parameters["target"])
    return not isinstance(backend, str) and activations not in backend.ACTIVATIONS


def _spread(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """At most `count` of them, as far apart as can be."""
    return items if len(items) <= count else [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `_is_left_out` and what is beyond --cases; skip tests marked `gpu` where there is none."""
    kept = [item for item in items if not _is_left_out(item, config.option.markexpr)]
    if config.option.cases:
        tests = defaultdict(list)
        for item in kept:
            tests[item.nodeid.partition("[")[0]].append(item)
        kept = [item for cases in tests.values() for item in _spread(cases, config.option.cases)]
    if left_out := set(items) - set(kept):
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = kept
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=BACKENDS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Every backend; those that cannot run here are skipped with the reason.

    Products of many rows stay with the backend's own kernel, which promises bits; tests/kernels/test_gpu.py has both
    routes.
    """
    monkeypatch.setenv("LLMPQ_BATCH_INVARIANT", "1")
    require_backend(request.param)
    on_gpu = request.param in ("cuda", "triton") and torch.cuda.is_available()
    return Target(request.param, "cuda" if on_gpu else "cpu")


@pytest.fixture(params=["reference", "cpu", "triton"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backends that have more than products, one after the other; tensors are made where each runs."""
    require_backend(request.param)
    monkeypatch.setenv("LLMPQ_BACKEND", request.param)
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda", torch.cuda.current_device()) if on_gpu else nullcontext():
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, shared by all of them, in whatever process they run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if workers else base) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPQ_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def measured_in_a_hurry() -> Iterator[None]:
    """Costs that tests measure need not be good ones. Programs that they start measure as for users."""
    from llmpq.measure import profiling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "VISIT_S", 0.0005)
        patch.setattr(profiling, "ROUND_TRIPS", 5)
        yield


@pytest.fixture(autouse=True)
def as_if_alone() -> None:
    """Whatever ran before in this process."""
    torch.manual_seed(0)
    warn_once.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
