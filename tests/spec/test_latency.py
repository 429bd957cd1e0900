"""What requests took, summed up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec import InvalidField, Latency, RequestTimes
from llmpq.spec.latency import PERCENTS, percentile


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.sampled_from([0, *PERCENTS, 100]))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_a_request_that_was_cancelled_early_has_no_latency_but_counts() -> None:
    times = [RequestTimes(1.0, 2.0, 6.0, 5), RequestTimes(1.0, 4.0, 4.0, 1), RequestTimes(2.0, None, 3.0, 0)]
    assert [t.ttft_s for t in times] == [1.0, 3.0, None]
    assert [t.tpot_s for t in times] == [1.0, None, None]
    found = Latency.of(times)
    assert (found.requests, found.requests_per_s, found.tokens_per_s) == (3, 3 / 5, 6 / 5)
    assert found.ttft_s == pytest.approx([2.0, 2.8, 2.9, 2.98]) and found.tpot_s == (1.0,) * len(PERCENTS)
    nothing = Latency.of([times[2]])
    assert (nothing.ttft_s, nothing.tpot_s, nothing.tokens_per_s) == (None, None, 0.0)


def test_times_are_in_order() -> None:
    with pytest.raises(InvalidField, match="not in order"):
        RequestTimes(1.0, 3.0, 2.0, 1)
