"""Activations, learned positions, the likeliest token, and products that add a residual."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from llmpq import kernels
from llmpq.spec import W16, Precision
from tests.support.reference import random_weight

FUNCTIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if reason := kernels.available_backends()[request.param]:
        pytest.skip(f"backend {request.param} is not available: {reason}")
    monkeypatch.setenv("LLMPQ_BACKEND", request.param)
    return str(request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_is_the_function_of_its_name(name: str, gated: bool) -> None:
    for n in (64, 77):  # the second is no multiple of a vector's width
        x = torch.linspace(-30, 30, 5 * n).view(5, n)
        x = torch.cat((x, torch.randn(5, n)), 1) if gated else x
        expected = FUNCTIONS[name](x[:, :n].double()) * (x[:, n:].double() if gated else 1)
        found = kernels.activate_(x.clone(), name, gated)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
        x[:, 3] = torch.nan
        assert kernels.activate_(x.clone(), name, gated)[:, 3].isnan().all()


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_takes_rows_apart(name: str, gated: bool) -> None:
    """Bit for bit, whatever is computed with a row."""
    for n in (96, 1534):
        x = torch.randn(29, n, generator=torch.Generator().manual_seed(1))
        torch.set_num_threads(1)
        alone = torch.cat([kernels.activate_(x[i : i + 1].clone(), name, gated) for i in range(29)])
        for threads in (1, 7):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.activate_(x.clone(), name, gated), alone)
            assert torch.equal(kernels.activate_(x[5:16].clone(), name, gated), alone[5:16])


def test_what_cannot_be_activated_is_an_error() -> None:
    with pytest.raises(ValueError, match="activation is 'swish', expected one of silu"):
        kernels.activate_(torch.zeros(1, 2), "swish", False)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[1, 3\]"):
        kernels.activate_(torch.zeros(1, 3), "silu", True)


@pytest.mark.usefixtures("backend")
def test_learned_positions_are_added_where_tokens_stand() -> None:
    table, x = torch.randn(9, 5), torch.randn(6, 5)
    lens = [(0, 3, 3), (1, 1, 9), (2, 2, 5)]  # slot, new tokens, tokens
    sequences = kernels.Sequences(*(torch.tensor(column, dtype=torch.int32) for column in zip(*lens, strict=True)))
    expected = x + table[[0, 1, 2, 8, 3, 4]]
    assert torch.equal(kernels.add_positions_(x, table, sequences), expected)
    with pytest.raises(ValueError, match="table has 8 positions, but context_lens says 9"):
        kernels.add_positions_(x, table[:8], sequences)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [1, 17, 1024, 5000])
def test_argmax_is_the_first_of_the_largest(size: int) -> None:
    x = torch.randint(-40, 40, (12, size), generator=torch.Generator().manual_seed(size)).float()
    x[3] = -torch.inf
    x[4, size // 2] = torch.inf
    expected = [row.index(max(row)) for row in x.tolist()]
    assert kernels.argmax(x, torch.empty(12, dtype=torch.int64)).tolist() == expected


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [Precision(4, 32), Precision(8, 64, "offset"), W16], ids=str)
def test_a_residual_is_added_after_the_bias(precision: Precision, dtype: torch.dtype, backend: str) -> None:
    w = kernels.prepare(random_weight(40, 96, precision), backend=backend)
    x, bias, residual = torch.randn(13, 96).to(dtype), torch.randn(40), torch.randn(13, 40).to(dtype)
    for rows in (1, 13):
        plain = kernels.gemm(x[:rows], w, bias=bias)
        found = kernels.gemm(x[:rows], w, bias=bias, residual=residual[:rows], out=torch.full_like(plain, torch.nan))
        assert torch.equal(found, plain + residual[:rows])
    with pytest.raises(ValueError, match="residual is"):
        kernels.gemm(x, w, residual=residual[:, 1:])
