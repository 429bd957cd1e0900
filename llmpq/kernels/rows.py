"""What a decoder does to each row by itself, besides products: norms, activations, scales, positions, the likeliest
token."""

from __future__ import annotations

from typing import Any, get_args

import torch

from llmpq.kernels.outputs import check_out
from llmpq.kernels.registry import cache_backend, load
from llmpq.kernels.sequences import Sequences
from llmpq.kernels.weight import FLOAT_DTYPES
from llmpq.spec.layers import Activation

ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def operations(x: torch.Tensor) -> Any:
    """The module of the backend whose operations besides products suit x."""
    return load(cache_backend(x.device, x.dtype))


def activate_(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """The activation of x [t, n], in place; `gated`: of x's first half, times its second half; [t, n / 2] then.

    One of ACTIVATIONS; gelu_tanh is gelu with the approximation by a tanh. swiglu_clamped, always gated, is
    gate * sigmoid(1.702 * gate) * (up + 1) with the first half as the gate, at most 7, and the second as up, from -7 to
    7. On a CPU a row's result depends on nothing but the row. Raises ValueError.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or x.stride(1) != 1 or (gated and x.shape[1] % 2):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [t, n] with rows in one piece")
    if activation == "swiglu_clamped" and not gated:
        raise ValueError("activation is 'swiglu_clamped', which is of a gate and its other half; expected gated")
    y = x[:, : x.shape[1] // 2] if gated else x
    if len(x):
        operations(x).activate_(x, activation, gated)
    return y


def scale_(x: torch.Tensor, factor: float, cap: float | None = None) -> torch.Tensor:
    """x [t, n] *= factor, in place; then, with a cap, x = cap * tanh(x / cap), which keeps |x| below it.

    Rows of x may lie any distance apart. Raises ValueError.
    """
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or x.stride(1) != 1:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [t, n] with rows in one piece")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap is {cap}, expected more than 0, or None")
    if len(x):
        operations(x).scale_(x, factor, cap)
    return x


def add_positions_(x: torch.Tensor, table: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """x [t, n] += the rows of a table [>= context_len, n] for the positions of tokens; in place. Raises ValueError."""
    if len(table) < sequences.longest:
        raise ValueError(f"the table has {len(table)} positions, but context_lens says {sequences.longest}")
    if (x.shape, x.dtype) != ((sequences.tokens, *table.shape[1:]), table.dtype) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, expected contiguous {table.dtype} [{sequences.tokens}, {table.shape[1]}]"
        )
    operations(x).add_positions_(x, table, sequences)
    return x


def last_rows(x: torch.Tensor, sequences: Sequences, out: torch.Tensor) -> torch.Tensor:
    """The row of x [t, n] of each sequence's last token, in `out` [s, n]. Raises ValueError."""
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or len(x) != sequences.tokens or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected contiguous floating-point [{sequences.tokens}, n]")
    check_out(out, x[: len(sequences.slots)])
    operations(x).last_rows(x, sequences, out)
    return out


def argmax(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The column of the largest number in each row of x [rows, size], in `out` (int64 [rows]); of equal ones the first.

    Raises ValueError.
    """
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or x.shape[1] == 0:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [rows, size]")
    if (out.shape, out.dtype, out.device) != ((len(x),), torch.int64, x.device) or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)} on {out.device}, expected int64 [{len(x)}]")
    if len(x):
        operations(x).argmax(x, out)
    return out


def draws(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `draw_` can be asked of logits of a dtype on a device: of the backend "triton" alone."""
    return hasattr(load(cache_backend(device, dtype)), "draw_")


def draw_(tokens: torch.Tensor, logits: torch.Tensor, parameters: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens (int64 [rows]) drawn by their probability, given logits [rows, size]; in place.

    `parameters` are float64 [4, rows]: temperature, top_k, top_p and min_p, each as llmpq/runtime/sampling.py says, one
    after the other; where the temperature is 0, a token stays what it is. `numbers`, float64 [rows] from [0, 1), choose
    among what they leave, in the order of the columns. Weights and sums are float64, and a row's token depends on
    nothing but the row. Raises ValueError.
    """
    rows = len(logits)
    if logits.dim() != 2 or logits.dtype not in FLOAT_DTYPES or logits.stride(1) != 1:
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}, expected floating-point [rows, size]")
    for name, tensor, dtype, shape in (
        ("tokens", tokens, torch.int64, (rows,)),
        ("parameters", parameters, torch.float64, (4, rows)),
        ("numbers", numbers, torch.float64, (rows,)),
    ):
        if (tensor.dtype, tensor.shape, tensor.device) != (dtype, shape, logits.device) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected {dtype} {list(shape)}"
            )
    if rows:
        operations(logits).draw_(tokens, logits, parameters, numbers)
    return tokens


def _check_norm(x: torch.Tensor, out: torch.Tensor | None, **parameters: torch.Tensor) -> None:
    check_out(out, x)
    if x.dim() < 1 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [..., size]")
    for name, parameter in parameters.items():
        if parameter.shape != x.shape[-1:] or parameter.dtype not in FLOAT_DTYPES or parameter.device != x.device:
            raise ValueError(
                f"{name} is {parameter.dtype} {list(parameter.shape)} on {parameter.device}, expected floating-point "
                f"[{x.shape[-1]}] on {x.device}"
            )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + x / sqrt(mean(x**2) + eps) * weight [size] over the last dim of x [..., size], or `out`.

    `out` may be x. Raises ValueError.
    """
    _check_norm(x, out, weight=weight)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)} on {residual.device}, expected {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    y: torch.Tensor = operations(x).rms_norm(x, weight, eps, out, residual)
    return y


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim of x [..., size]. Raises ValueError."""
    _check_norm(x, out, weight=weight, bias=bias)
    y: torch.Tensor = operations(x).layer_norm(x, weight, bias, eps, out)
    return y


def head_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in place of each group of x [t, groups, size], by weight [size]: of queries and keys before they rotate.

    Groups follow each other without gaps; tokens may lie any distance apart. Raises ValueError.
    """
    whole = x.dim() == 3 and x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    if not whole or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, expected floating-point [t, groups, size] without gaps within a token"
        )
    _check_norm(x, None, weight=weight)
    if x.numel():
        operations(x).head_norm_(x, weight, eps)
    return x
