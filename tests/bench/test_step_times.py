"""How the time of a step is added up."""

from __future__ import annotations

import pytest

from bench.kernels.step_times import by_kind, summary


def test_operations_are_added_up_by_what_they_are() -> None:
    operations = [("rms_norm", 1.0), ("gemm", 2.0), ("rotate_and_store", 4.0), ("attention", 8.0), ("gemm", 16.0)]
    assert by_kind(operations) == {"rms_norm": 1.0, "linears": 18.0, "attention": 12.0}


def test_overhead_is_what_linears_and_attention_leave_of_the_whole() -> None:
    parts = [{"linears": 5.0, "attention": 2.0, "rms_norm": seconds} for seconds in (1.0, 9.0, 2.0)]
    row = summary("decode 1", [10.0, 20.0, 14.0], parts)  # 2, 4 and 5 seconds are left
    assert row["seconds"] == 14.0 and row["parts"]["rms_norm"] == 2.0 and row["parts"]["python"] == 4.0
    assert row["overhead"] == pytest.approx(0.5)
    assert summary("decode 1", [3.0], [{}]) == {"step": "decode 1", "seconds": 3.0}
