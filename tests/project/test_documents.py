"""What the documents say is what the project is."""

from __future__ import annotations

import re

import pytest

from bench.tables.render import DOCUMENTS, ROOT, TABLES, render
from llmpq.cli.main import build_parser
from llmpq.spec import errors


def test_tables_are_those_of_the_results() -> None:
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        assert render(text) == text
        found += re.findall(r"<!-- table: (\w+) -->", text)
    assert sorted(found) == sorted(TABLES)


def test_readme_documents_every_exit_code() -> None:
    text = (ROOT / "README.md").read_text()
    codes = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LlmpqError)}
    for code in codes - {1}:
        assert re.search(rf"^\| {code} \|", text, re.MULTILINE), code


def test_paths_in_the_documents_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "bench/README.md"):
        for path in re.findall(r"`((?:llmpq|planner|csrc|bench|tests)/[\w./]+)`", (ROOT / document).read_text()):
            assert (ROOT / path).exists() or list(ROOT.glob(path)), f"{document} names {path}"


@pytest.mark.parametrize("command", ["run", "profile", "sensitivity", "plan", "quantize", "explain", "eval", "serve"])
def test_every_command_is_in_the_readme_and_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"llmpq {command}" in (ROOT / "README.md").read_text()
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args([command, "--help"])
    assert exit_.value.code == 0
    assert "--model" in capsys.readouterr().out
