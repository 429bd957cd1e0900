"""A stage's arena: tensors in use at once do not overlap, and there are no more of them than there is room for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llmpq import kernels
from llmpq.models.arena import Arena
from tests.support.kv_caches import empty_layer, sequences, store
from tests.support.planner_instances import model

CPU = torch.device("cpu")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address, and one past the last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def test_tensors_in_use_at_once_do_not_overlap() -> None:
    spec = model()
    arena = Arena(spec, 8, torch.float32, CPU, logit_rows=2)
    first, second = arena.hidden_states(8), arena.hidden_states(8)
    qkv = arena.empty(8, spec.linears("layer.0")["qkv"].n)
    rest = arena.empty(8, spec.widest_activations - spec.linears("layer.0")["qkv"].n)
    held = [first, second, qkv, rest, arena.logits(2)]
    for (_, end), (start, _) in pairwise(sorted(map(_extent, held))):
        assert end <= start
    assert arena.hidden_states(8).data_ptr() == first.data_ptr()
    assert arena.empty(8, 1).data_ptr() == qkv.data_ptr()


def test_tensors_are_in_the_same_places_in_every_pass() -> None:
    """A recorded program knows them by address, whatever the number of tokens."""
    arena = Arena(model(), 8, torch.float32, CPU, logit_rows=2)

    def places(tokens: int) -> list[int]:
        arena.begin(tokens)
        first = arena.hidden_states(tokens)
        between = [arena.empty(tokens, width, 2) for width in (3, 5)]
        return [tensor.data_ptr() for tensor in (first, *between, arena.hidden_states(tokens), arena.logits(1))]

    expected = places(8)
    arena.hidden_states(3)
    assert places(1) == places(5) == expected


def test_an_arena_has_room_for_one_step_of_its_size() -> None:
    spec = model()
    arena = Arena(spec, 4, torch.float32, CPU, logit_rows=2)
    arena.empty(4, spec.widest_activations)
    with pytest.raises(ValueError, match="larger than the step"):
        arena.empty(1, 1)
    with pytest.raises(ValueError, match="step of 5 tokens is larger"):
        arena.hidden_states(5)
    arena.hidden_states(4)
    assert arena.empty(1, 1).shape == (1, 1)
    assert arena.logits(3).shape == (3, spec.vocab_size)  # scoring asks for more rows than a step has sequences


@pytest.mark.parametrize("size", [8, 64])
def test_results_go_where_they_are_wanted(size: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, size), torch.randn(size), torch.randn(size)
    q = torch.randn(5, 2, 8)
    cache, of = empty_layer(1, 2, 5, 8), sequences([0], [5], [5])
    store(cache, 0, torch.randn(5, 2, 8), torch.randn(5, 2, 8))
    calls = {
        (5, size): (
            lambda **kw: kernels.rms_norm(x, weight, 1e-5, **kw),
            lambda **kw: kernels.layer_norm(x, weight, bias, 1e-5, **kw),
        ),
        (5, 2, 8): (lambda **kw: kernels.attention(q, cache, of, 0.3, **kw),),
    }
    for shape, functions in calls.items():
        for function in functions:
            out = torch.full(shape, torch.nan)
            assert function(out=out) is out
            assert torch.equal(out, function())
            with pytest.raises(ValueError, match="out is"):
                function(out=torch.empty(*shape[:-1], shape[-1] + 1))
