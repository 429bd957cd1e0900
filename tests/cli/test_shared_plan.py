"""What a rank checks before it loads, against what the first one says that it runs."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llmpq import __version__
from llmpq.cli.shared_plan import receive_plan
from llmpq.spec import UsageError
from tests.support.pipelines import load_spec, make_plan, tiny_model


class Second:
    """Rank 1, to which rank 0 has said this."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.rank, self._said = 1, said

    def share(self, text: None) -> str:
        return json.dumps(self._said)


def test_a_rank_takes_the_first_ones_plan_if_all_else_is_the_same(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa")
    spec = load_spec(checkpoint)
    plan, other = make_plan(spec, [2, 1], 2, 2), make_plan(spec, [1, 2], 2, 2)
    other.save(tmp_path / "other.json")
    plan.save(tmp_path / "plan.json")
    said = {"version": __version__, "model": spec.content_hash, "plan": plan.to_dict()}

    def given(plan: Path | None = None) -> Namespace:
        return Namespace(plan=plan, dry_run=False, model=str(tmp_path), load_format="auto")

    for own in (None, tmp_path / "plan.json"):
        received = receive_plan(Second(said), given(own))
        assert received is not None and received[0] == plan and received[1].spec.content_hash == spec.content_hash
    for change, own, problem in (
        ({}, tmp_path / "other.json", r"rank 0 has another plan \([0-9a-f]{16}\) than .*other.json of rank 1 \("),
        ({"model": "0" * 16}, None, rf"rank 0 has another model \(0{{16}}\) than .* of rank 1 \({spec.content_hash}\)"),
        ({"version": "0.0"}, None, f"rank 0 runs llmpq 0.0, and rank 1 {__version__}"),
    ):
        with pytest.raises(UsageError, match=problem):
            receive_plan(Second(said | change), given(own))
