"""The built-in texts, and those of the user."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llmpq.checkpoint.model_files import open_model
from llmpq.measure.text import calibration_text, evaluation_text, read_text, validation_text
from llmpq.spec import UsageError


def test_the_three_texts_are_long_and_share_no_paragraph() -> None:
    texts = [calibration_text(), validation_text(), evaluation_text()]
    paragraphs = [[" ".join(paragraph.split()) for paragraph in text.split("\n\n")] for text in texts]
    repeated = Counter(paragraph for part in paragraphs for paragraph in part if paragraph)
    assert set(repeated.values()) == {1}
    tokenizer = open_model("demo").tokenizer
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert lengths[0] >= 20_000 and min(lengths[1:]) >= 10_000, lengths


def test_a_text_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "good").write_text("Ein Satz.\n")
    assert read_text(tmp_path / "good") == "Ein Satz.\n"
    for name, problem in (("missing", "cannot read"), ("empty", "is empty"), ("binary", "not UTF-8")):
        with pytest.raises(UsageError, match=problem):
            read_text(tmp_path / name)
