"""Layer kinds: which layers cost the same, what their queries attend to, what their cache holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec import W16, Context, InvalidField, LayerKind, Rope, unit_ops
from llmpq.spec.layers import shortest_period
from tests.support.planner_instances import model

FULL, NEAR, NEARER = LayerKind(), LayerKind(8), LayerKind(4)

spans = st.tuples(st.integers(1, 60), st.integers(0, 60)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(spans, min_size=1, max_size=5), st.none() | st.integers(1, 100))
def test_keys_are_those_of_each_query_on_average(of_step: list[tuple[int, int]], window: int | None) -> None:
    attended = [min(keys, window or keys) for first, last in of_step for keys in range(first, last + 1)]
    assert Context(tuple(of_step)).keys(window) == pytest.approx(sum(attended) / len(attended), rel=1e-12)


def test_prompts_and_single_queries_are_spans() -> None:
    assert Context.of_prompts(3, 5).keys() == (1 + 2 + 3 + 1 + 2 + 3 + 4 + 5) / 8
    assert Context.of(3, 5).keys() == 4 and Context.of(3, 5).keys(4) == 3.5


def test_kinds_are_repeated_and_groups_are_numbered_as_they_appear() -> None:
    spec = model(7, layer_kinds=(NEAR, NEAR, FULL))
    assert [spec.layer_kind(i).window for i in range(7)] == [8, 8, None, 8, 8, None, 8]
    assert spec.layer_groups == (0, 0, 1, 0, 0, 1, 0)
    assert spec.distinct_units == ("embedding", "layer.0", "layer.2", "head")
    mixed = model(4, layer_kinds=(FULL, NEARER, LayerKind(8), NEARER))
    assert mixed.layer_groups == (0, 1, 2, 1)
    assert mixed.distinct_units == ("embedding", "layer.0", "layer.1", "layer.2", "head")
    assert model(3).layer_groups == (0, 0, 0) and model(3).distinct_units == ("embedding", "layer.0", "head")


def test_only_the_attention_of_a_layer_depends_on_its_window() -> None:
    spec, context = model(2, layer_kinds=(FULL, NEARER)), Context.of(3, 9)
    full, near = (unit_ops(spec, unit, W16, "a16", 2, 2, context) for unit in ("layer.0", "layer.1"))
    assert [(a.kind, a.context, b.context) for a, b in zip(full, near) if a != b] == [("attention", 6.0, 3.5)]


@pytest.mark.parametrize(("window", "tokens"), [(None, 960), (4, 64), (59, 64), (60, 128), (800, 832), (999, 960)])
def test_a_cache_holds_the_window_and_the_step_in_whole_blocks(window: int | None, tokens: int) -> None:
    assert LayerKind(window).cached_tokens(length=900, step=6) == tokens


def test_bad_kinds_are_refused_by_the_field() -> None:
    for change, message in (
        ({"layer_kinds": ()}, "layer_kinds: has 0 entries for 2 layers"),
        ({"layer_kinds": (FULL,) * 3}, "layer_kinds: has 3 entries for 2 layers"),
    ):
        with pytest.raises(InvalidField, match=message):
            model(2, **change)
    with pytest.raises(InvalidField, match="window: is 0"):
        LayerKind(0)


def test_layers_that_rotate_otherwise_cost_the_same() -> None:
    kinds = (LayerKind(8, Rope(1e4, 8)), LayerKind(8), LayerKind(None, Rope(1e4, 8)))
    assert model(6, layer_kinds=kinds).layer_groups == (0, 0, 1, 0, 0, 1)


def test_the_shortest_period_is_found() -> None:
    for values, period in ("abab", "ab"), ("aaa", "a"), ("aabaa", "aab"), ("abc", "abc"), ("a", "a"):
        assert shortest_period(values) == tuple(period)
