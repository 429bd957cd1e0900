"""What the tests that ran have shown of each model family, for the table in README.md."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from bench.machine import describe, versions, write_results
from tests.support.tiny_models import family_of_kind


class FamilyRecord:
    """Notes how the cases of tests marked `family(column, ...)` end, by the family of their parameter `kind`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cases: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
        report = (yield).get_result()
        marker = item.get_closest_marker("family")
        if marker is None or report.when != "call" or report.skipped or not isinstance(item, pytest.Function):
            return
        for column in marker.args:
            self._cases[family_of_kind(item.callspec.params["kind"])][column].append(report.passed)

    def pytest_sessionfinish(self) -> None:
        rows = [
            {"family": family, **{column: [sum(ended), len(ended)] for column, ended in of.items()}}
            for family, of in sorted(self._cases.items())
        ]
        write_results(self._path, {**describe(), "versions": versions(("transformers", "gguf")), "rows": rows})
