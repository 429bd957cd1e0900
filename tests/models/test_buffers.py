"""A stage's buffers: what they give does not overlap while it is in use, and they do not give more than they have."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from llmpq import kernels
from llmpq.models.buffers import Buffers
from llmpq.models.rotary import rotate_
from tests.support.planner_instances import model

CPU = torch.device("cpu")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address, and one past the last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def test_what_is_in_use_at_once_does_not_overlap() -> None:
    spec = model()
    buffers = Buffers(spec, 8, torch.float32, CPU)
    first = buffers.hidden_states(8)
    second = buffers.hidden_states(8, first)
    qkv = buffers.take(8, spec.layer_linears[0].n)
    rest = buffers.take(8 * spec.widest_activations - 8 * spec.layer_linears[0].n)
    held = [tensor for tensor in (first, second, qkv, rest) if tensor is not None]
    assert len(held) == 4
    for (_, end), (start, _) in combinations(sorted(map(_extent, held)), 2):
        assert end <= start
    again = buffers.hidden_states(8, second)
    assert again is not None and first is not None and again.data_ptr() == first.data_ptr()


def test_no_more_is_given_than_there_is() -> None:
    spec = model()
    buffers = Buffers(spec, 4, torch.float32, CPU)
    buffers.take(4, spec.widest_activations)
    with pytest.raises(ValueError, match="larger than the step"):
        buffers.take(1)
    buffers.hidden_states(4)
    assert buffers.take(1) is not None


@pytest.mark.parametrize("size", [8, 64])
def test_results_go_where_they_are_wanted(size: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, size), torch.randn(size), torch.randn(size)
    q = torch.randn(5, 2, 8)
    cache = torch.randn(1, 2, 5, 8)
    lens = [torch.tensor([n], dtype=torch.int32) for n in (0, 5, 5)]
    calls = {
        (5, size): (
            lambda **kw: kernels.rms_norm(x, weight, 1e-5, **kw),
            lambda **kw: kernels.layer_norm(x, weight, bias, 1e-5, **kw),
        ),
        (5, 2, 8): (lambda **kw: kernels.attention(q, cache, cache, *lens, 0.3, **kw),),
    }
    for shape, functions in calls.items():
        for function in functions:
            out = torch.full(shape, torch.nan)
            assert function(out=out) is out
            assert torch.equal(out, function())
            with pytest.raises(ValueError, match="out is"):
                function(out=torch.empty(*shape[:-1], shape[-1] + 1))


def test_rotation_is_that_of_pairs_half_a_head_apart() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(3, 2, 8), torch.randn(3, 1, 4)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((pairs.real, pairs.imag), -1)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    for scratch in (None, torch.empty_like(x)):
        rotated = x.clone()
        rotate_(rotated, cos, sin, scratch)
        torch.testing.assert_close(rotated, expected)
