"""A mixture of experts: who goes where, grouped products, and their sums."""

from __future__ import annotations

import pytest
import torch

from llmpq import kernels
from llmpq.kernels import ExpertWeights, available_backends
from llmpq.kernels.backends import plain_experts, triton_gemm
from llmpq.spec import W16, ActivationMode, Precision
from tests.support.grid import name
from tests.support.launches import counted
from tests.support.reference import assert_product, random_weight
from tests.support.target import Target

PRODUCTS: tuple[tuple[Precision, ActivationMode], ...] = (
    *((Precision(bits, 32, zero), "a16") for bits, zero in ((3, "asym"), (4, "offset"), (8, "sym"))),
    (W16, "a16"),
    (Precision(3, 64, "offset"), "a8"),
    (Precision(4, 64, "asym"), "a8x2"),
    (Precision(8, None, "asym"), "a8"),
)
W4 = Precision(4, 64, "asym")
products = pytest.mark.parametrize(("precision", "activations"), PRODUCTS, ids=map(name, PRODUCTS))


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_tokens_go_to_the_experts_of_their_largest_logits(normalized: bool, sigmoid: bool) -> None:
    for experts, per_token in ((1, 1), (5, 5), (61, 4)):
        logits = 3 * torch.randn(17, experts)
        logits[3] = torch.arange(experts) // 2 % 3  # of equal ones the first
        scores = logits.double().sigmoid() if sigmoid else logits.double().softmax(-1)
        order = [sorted(range(experts), key=lambda e: (-row[e], e))[:per_token] for row in logits.tolist()]
        weights = scores.gather(-1, torch.tensor(order))
        if normalized:
            weights /= weights.sum(-1, keepdim=True)
        chosen, found = kernels.route(logits, per_token, normalized, sigmoid=sigmoid)
        assert (chosen.dtype, found.dtype) == (torch.int32, torch.float32)
        assert chosen.tolist() == order
        torch.testing.assert_close(found.double(), weights, atol=1e-7, rtol=1e-6)
        if normalized and not sigmoid:  # what gpt_oss computes
            torch.testing.assert_close(weights, logits.double().gather(-1, torch.tensor(order)).softmax(-1))


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_experts_give_is_summed_by_weight(dtype: torch.dtype) -> None:
    y, weights, residual = torch.randn(9 * 4, 37).to(dtype), torch.rand(9, 4), torch.randn(9, 37).to(dtype)
    exact = residual.double() + (y.view(9, 4, 37).double() * weights.double()[..., None]).sum(1)
    out = torch.empty_like(residual)
    assert kernels.combine(y, weights, residual, out) is out
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=4 * 2.0**-23, rtol=eps)
    assert torch.equal(kernels.combine(y, weights, residual, residual), out)


@products
@pytest.mark.parametrize("shared_rows", [True, False])
def test_a_grouped_product_is_that_of_each_token_with_its_experts(
    target: Target, precision: Precision, activations: ActivationMode, shared_rows: bool
) -> None:
    """Against float64, and with the bits of `gemm` of one row."""
    count, n, k, choices = 6, 40, 100, 2
    plain = [random_weight(n, k, precision) for _ in range(count)]
    weights = [kernels.prepare(w, target.device, backend=target.backend) for w in plain]
    biases = torch.randn(count, n, device=target.device)
    # One token; and many, of which expert 2 gets more than a tile has rows, and expert 5 none.
    for tokens in (1,) if target.interpreted else (1, 29):
        experts = torch.stack([torch.randperm(count - 1)[:choices] for _ in range(tokens)])
        experts[1:-2, 1] = 2
        x = torch.randn(tokens if shared_rows else tokens * choices, k, device=target.device)
        out = torch.full((tokens * choices, n), torch.nan, device=target.device)
        kernels.grouped_gemm(
            x, weights, experts.int().to(target.device), biases=biases, out=out, activations=activations
        )
        rows = x.repeat_interleave(choices, 0) if shared_rows else x
        for expert in range(count):
            at = (experts.flatten() == expert).nonzero()[:, 0]
            if len(at):
                assert_product(out[at], rows[at], plain[expert], biases[expert].cpu(), activations)
        for row, expert in enumerate(experts.flatten().tolist()):
            alone = kernels.gemm(rows[row : row + 1], weights[expert], bias=biases[expert], activations=activations)
            assert target.same(out[row], alone[0], precision)


@pytest.mark.parametrize(
    ("precision", "parts", "shared_rows"),
    [(Precision(3, 32, "asym"), 2, True), (Precision(4, 64, "offset"), 1, False), (Precision(8, None), 3, True)],
    ids=str,
)
def test_few_pairs_of_tokens_and_experts_are_multiplied_without_asking_who_they_are(
    triton_device: torch.device, precision: Precision, parts: int, shared_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 2 gets more rows than a program takes, expert 5 none; also where k is summed in several parts."""
    monkeypatch.setattr(triton_gemm, "_splits", lambda sms, n, k: parts)
    monkeypatch.setattr(triton_gemm, "_config", triton_gemm._config.__wrapped__)  # which keeps what it has found
    count, n, k, tokens, choices = 6, 40, 400, 22, 2
    plain = [random_weight(n, k, precision) for _ in range(count)]
    weights = ExpertWeights(kernels.prepare(w, triton_device, backend="triton") for w in plain)
    experts = torch.stack([torch.randperm(count - 1)[:choices] for _ in range(tokens)]).int()
    experts[1:-2, 1] = 2
    x, biases = torch.randn(tokens if shared_rows else tokens * choices, k), torch.randn(count, n)
    x, biases, chosen = (tensor.to(triton_device) for tensor in (x, biases, experts))
    assert experts.numel() <= kernels.grouped_pairs(triton_device, precision)
    out = torch.full((tokens * choices, n), torch.nan, device=triton_device)
    assert weights.distances.shape[0] == count  # made once
    with counted() as operations:
        kernels.grouped_gemm(x, weights, chosen, biases=biases, out=out)
    names = ["grouped_kernel", *(["reduce_kernel"] if parts > 1 else [])]
    assert [name for name, *_ in operations.launches] == names and not operations.torch
    looped = torch.empty_like(out)
    plain_experts.grouped_gemm(x, weights, chosen, biases, looped, "a16")
    assert torch.equal(out, looped)
    rows = x.repeat_interleave(choices, 0) if shared_rows else x
    for expert in range(count):
        at = (experts.flatten() == expert).nonzero()[:, 0]
        if len(at):
            assert_product(out[at], rows[at], plain[expert], biases[expert].cpu(), "a16")


needs_cpu = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the backend cpu is not available")


@needs_cpu
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("precision", "activations"), [(W4, "a16"), (W4, "a8x2")], ids=["a16", "a8x2"])
def test_threads_do_not_change_a_bit_of_a_grouped_product(precision: Precision, activations: ActivationMode) -> None:
    """Of experts with as many rows as fill the packed rows of several parts, with few, and with none."""
    weights = [kernels.prepare(random_weight(230, 1056, precision), backend="cpu")] * 5
    experts = torch.tensor([[3, 0]] * 250 + [[1, 3]] * 5 + [[2, 3]], dtype=torch.int32)
    x, results = torch.randn(256, 1056), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = torch.full((512, 230), torch.nan)
        results.append(kernels.grouped_gemm(x, weights, experts, out=out, activations=activations))
    assert torch.equal(*results)
    assert torch.equal(results[0], kernels.gemm(x.repeat_interleave(2, 0), weights[0], activations=activations))


@needs_cpu
@pytest.mark.usefixtures("threads")
def test_a_recorded_mixture_of_experts_gives_the_bits_of_an_eager_one() -> None:
    tokens, count, choices, hidden, inner = 20, 6, 2, 64, 96
    router = kernels.prepare(random_weight(count, hidden, W16), backend="cpu")
    up, down = (
        [kernels.prepare(random_weight(*shape, Precision(4, 32)), backend="cpu") for _ in range(count)]
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    biases, weight = torch.randn(count, 2 * inner), torch.randn(16)
    x, logits, wide = torch.empty(tokens, hidden), torch.empty(tokens, count), torch.empty(tokens * choices, 2 * inner)
    narrow, out = torch.empty(tokens * choices, hidden), torch.empty(tokens, hidden)
    chosen, parts = torch.empty(tokens, choices, dtype=torch.int32), torch.empty(tokens, choices)

    def mixture(t: int) -> torch.Tensor:
        pairs = t * choices
        kernels.head_norm_(x[:t].view(t, 4, 16), weight, 1e-5)
        kernels.gemm(x[:t], router, out=logits[:t])
        kernels.scale_(logits[:t], 0.25, 30.0)
        kernels.route(logits[:t], choices, True, out=(chosen[:t], parts[:t]))
        kernels.grouped_gemm(x[:t], up, chosen[:t], biases=biases, out=wide[:pairs])
        y = kernels.activate_(wide[:pairs], "swiglu_clamped", True)
        kernels.grouped_gemm(y, down, chosen[:t], out=narrow[:pairs])
        return kernels.combine(narrow[:pairs], parts[:t], x[:t], out[:t])

    hidden_states = torch.randn(tokens, hidden)
    expected = []
    for t in (1, tokens):
        x.copy_(hidden_states)
        expected.append(mixture(t).clone())
    program = kernels.Program(lambda: mixture(3))
    assert program.names == (
        *("head_norm", "gemm", "scale", "route", "grouped_gemm", "activation", "grouped_gemm", "combine"),
    )
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for t, right in zip((1, tokens), expected, strict=True):
            x.copy_(hidden_states)
            program.run(t)
            assert torch.equal(out[:t], right)
    with pytest.raises(RuntimeError, match="scale was called for 3 rows while a program was recorded for 2"):
        kernels.Program(lambda: [kernels.scale_(x[:rows], 1.0) for rows in (2, 4, 3)])


def test_dtypes_that_a_backend_lacks_are_converted() -> None:
    weights = [kernels.prepare(random_weight(24, 64, Precision(4, 32))) for _ in range(3)]
    x, experts = torch.randn(5, 64), torch.tensor([[0], [2], [0], [1], [2]], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(5, 24, dtype=dtype)
        kernels.grouped_gemm(x.to(dtype), weights, experts, out=out)
        alone = [kernels.gemm(x[i : i + 1].to(dtype), weights[e]) for i, e in enumerate(experts[:, 0].tolist())]
        assert torch.equal(out, torch.cat(alone))


def test_what_does_not_fit_is_an_error() -> None:
    w = kernels.prepare(random_weight(24, 64, Precision(4, 32)))
    other = kernels.prepare(random_weight(16, 64, Precision(4, 32)))
    x, experts, out = torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.int32), torch.empty(6, 24)
    with pytest.raises(ValueError, match=r"weight 1 is .* \[16, 64\] .* but weight 0 is .* \[24, 64\]"):
        kernels.grouped_gemm(x, [w, other], experts, out=out)
    with pytest.raises(ValueError, match="weights is empty"):
        kernels.grouped_gemm(x, [], experts, out=out)
    with pytest.raises(ValueError, match=r"expected floating-point \[3, 64\] or \[6, 64\]"):
        kernels.grouped_gemm(x[:2], [w, w], experts, out=out)
    with pytest.raises(ValueError, match=r"out is .* expected contiguous torch.float32 \[6, 24\]"):
        kernels.grouped_gemm(x, [w, w], experts, out=out[:3])
    with pytest.raises(ValueError, match=r"biases is .* expected floating-point \[2, 24\]"):
        kernels.grouped_gemm(x, [w, w], experts, out=out, biases=torch.zeros(24))
    with pytest.raises(ValueError, match="experts names 2, but there are 2"):
        kernels.grouped_gemm(x, [w, w], experts + 2, out=out)
    with pytest.raises(ValueError, match=r"experts is torch\.int64"):
        kernels.grouped_gemm(x, [w, w], experts.long(), out=out)
    with pytest.raises(ValueError, match="per_token is 5, expected 1 to 4"):
        kernels.route(torch.zeros(2, 4), 5, True)
    with pytest.raises(ValueError, match=r"weights is .* expected contiguous torch.float32"):
        kernels.combine(torch.zeros(4, 8), torch.zeros(2, 2).double(), torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"residual is .* \[4, 8\]"):
        kernels.combine(torch.zeros(4, 8), torch.zeros(2, 2), torch.zeros(4, 8), torch.zeros(2, 8))
