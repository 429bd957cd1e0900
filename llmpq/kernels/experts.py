"""A mixture of experts: which of them each token goes to, their products, and the sum of what they give.

A token's choices are numbered j = 0 ... K - 1, the largest weight first. What its experts make of it are K rows in a
row: choice j of token i is row i * K + j.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.kernels.outputs import check_out
from llmpq.kernels.registry import check_activations
from llmpq.kernels.rows import operations
from llmpq.kernels.weight import FLOAT_DTYPES, ExpertWeights, PreparedWeight


def route(
    logits: torch.Tensor,
    per_token: int,
    normalized: bool,
    *,
    sigmoid: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights, (int32 [t, K], float32 [t, K]), or `out`, by logits [t, experts].

    The experts are those of the K = per_token largest logits, the largest first; of equal ones the first expert. Their
    weights are their parts in the softmax over all experts in float32, or with `sigmoid` the sigmoids of their logits;
    if normalized, divided by their sum. (The softmax over the K chosen logits, as gpt_oss has it, is the normalized
    one: what the others add to the denominator cancels.) A gate of a single expert is `sigmoid` with K = 1 of logits
    [t, 1]. Raises ValueError.
    """
    if logits.dim() != 2 or logits.dtype not in FLOAT_DTYPES or logits.stride(1) != 1:
        raise ValueError(
            f"logits is {logits.dtype} {list(logits.shape)}, expected floating-point [t, experts] with rows in one "
            "piece"
        )
    if not 1 <= per_token <= logits.shape[1]:
        raise ValueError(f"per_token is {per_token}, expected 1 to {logits.shape[1]}, as many as there are experts")
    shape, device = (len(logits), per_token), logits.device
    if out is None:
        experts = torch.empty(shape, dtype=torch.int32, device=device)
        weights = torch.empty(shape, dtype=torch.float32, device=device)
    else:
        experts, weights = out
        for tensor, dtype in ((experts, torch.int32), (weights, torch.float32)):
            _check("out", tensor, dtype, shape, device)
    if len(logits):
        operations(logits).route(logits, normalized, sigmoid, experts, weights)
    return experts, weights


def grouped_gemm(
    x: torch.Tensor,
    weights: Sequence[PreparedWeight],
    experts: torch.Tensor,
    *,
    biases: torch.Tensor | None = None,
    out: torch.Tensor,
    activations: str = "a16",
) -> torch.Tensor:
    """Products of tokens with the experts that `route` chose for them: row i * K + j of out [t * K, n] is
    x[i] @ weights[experts[i, j]].T + biases[experts[i, j]].

    x is [t, k], one row for all choices of a token, or [t * K, k], a row for each of them; experts int32 [t, K]; biases
    [number of experts, n]. `weights` are the experts' in order; others than ExpertWeights are checked at each call.
    Tokens are grouped by expert; the weight of an expert that nobody chose is not read. `activations` are those of
    `gemm`, and rows have the bits that it gives them; but with the backend "cuda" those of Triton's where there are few
    pairs of a token and an expert. Of more than `grouped_pairs`, GPU backends loop over the experts, and wait for the
    device to know which (llmpq/kernels/backends/plain_experts.py). Raises ValueError.
    """
    weights = weights if isinstance(weights, ExpertWeights) else ExpertWeights(weights)
    w = weights[0]
    if activations not in w.activations:
        check_activations(w.backend, activations, w.precision)
    if experts.dim() != 2 or experts.shape[1] < 1:
        raise ValueError(f"experts has shape {list(experts.shape)}, expected [t, K]")
    _check("experts", experts, torch.int32, tuple(experts.shape), w.device)
    tokens, pairs = len(experts), experts.numel()
    if x.dtype not in FLOAT_DTYPES or x.shape not in ((tokens, w.k), (pairs, w.k)):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, expected floating-point [{tokens}, {w.k}] or [{pairs}, {w.k}]"
        )
    if x.device != w.device:
        raise ValueError(f"x is on {x.device}, but the weights are on {w.device}")
    if biases is not None and (
        biases.shape != (len(weights), w.n) or biases.dtype not in FLOAT_DTYPES or biases.device != w.device
    ):
        raise ValueError(
            f"biases is {biases.dtype} {list(biases.shape)} on {biases.device}, expected floating-point "
            f"[{len(weights)}, {w.n}] on {w.device}"
        )
    _check("out", out, x.dtype, (pairs, w.n), w.device)
    if not pairs:
        return out
    dtypes = w.module.ACTIVATION_DTYPES
    native = x.dtype if x.dtype in dtypes else dtypes[0]
    rows = x.to(native)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if biases is not None and (biases.dtype != native or not biases.is_contiguous()):
        biases = biases.to(native).contiguous()
    result = out if native == x.dtype else torch.empty(out.shape, dtype=native, device=out.device)
    w.module.grouped_gemm(rows, weights, experts, biases, result, activations)
    return out if result is out else out.copy_(result)


def combine(y: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out [t, n] = residual [t, n] + sum over j of weights [t, K] (float32) times row i * K + j of y [t * K, n].

    The sum is taken from j = 0 on, then the residual is added, and the result is rounded once; `out` may be the
    residual itself. Raises ValueError.
    """
    if weights.dim() != 2 or weights.shape[1] < 1:
        raise ValueError(f"weights has shape {list(weights.shape)}, expected [t, K]")
    _check("weights", weights, torch.float32, tuple(weights.shape), y.device)
    tokens, pairs = len(weights), weights.numel()
    if y.dim() != 2 or y.dtype not in FLOAT_DTYPES or len(y) != pairs or not y.is_contiguous():
        raise ValueError(f"y is {y.dtype} {list(y.shape)}, expected contiguous floating-point [{pairs}, n]")
    check_out(out, y[:tokens])
    _check("residual", residual, y.dtype, tuple(out.shape), y.device)
    if len(out):
        operations(y).combine(y, weights, residual, out)
    return out


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless a tensor is contiguous and as it should be."""
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected contiguous {dtype} "
            f"{list(shape)} on {device}"
        )
