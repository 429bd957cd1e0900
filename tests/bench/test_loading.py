"""The times of quantizing and loading are those of commands that did it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.quality import loading
from bench.tables.loading import loading as table
from tests.support.pipelines import tiny_model


@pytest.mark.full
def test_both_quantizers_are_timed(tmp_path: Path) -> None:
    model = str(tiny_model(tmp_path / "model", "llama-gqa").path)
    loading.main(["--model", model, "--bits", "4", "--group-size", "32", "--json-out", str(tmp_path / "found.json")])
    results = json.loads((tmp_path / "found.json").read_text())
    assert [row["quantizer"] for row in results["rows"]] == ["rtn", "gptq"]
    assert all(row["quantize_s"] > row["load_s"] > 0 and row["peak_bytes"] > 2**27 for row in results["rows"])
    assert len([line for line in table(results) if "gptq" in line]) == 1
    with pytest.raises(SystemExit, match=r"--bits 4 .* ended with 2"):
        loading.main(["--model", str(tmp_path / "missing"), "--bits", "4"])


def test_what_takes_too_long_is_bold() -> None:
    row = {"quantizer": "gptq", "bits": 4, "quantize_s": 121.0, "peak_bytes": 2**31, "load_s": 100.0}
    assert table({"group_size": 64, "threads": 2, "rows": [row]})[-1] == (
        "| gptq | 4 | **121.0 s** | 2.00 GiB | 100.00 s | **1x** |"
    )
