"""The Triton kernels of a mixture of experts; llmpq/kernels/backends/triton_experts.py launches them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["logits_stride"])
def route_kernel(
    logits_ptr,  # [t, EXPERTS], tokens logits_stride elements apart
    experts_ptr,  # int32 [t, CHOICES]
    weights_ptr,  # float32 [t, CHOICES]
    logits_stride,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The experts with the largest logits of a token, which is the program, and their weights."""
    token, expert, choice = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    there = expert < EXPERTS
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=there, other=float("-inf")).to(tl.float32)
    # NaN is no less than any number, and what is taken is less than any, so the choices are as many experts.
    left = tl.where(logits == logits, logits, float("inf"))
    left = tl.where(there, tl.maximum(left, -3.4e38), float("-inf"))
    chosen = tl.zeros((BLOCK_C,), tl.int32)
    largest = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    for j in range(CHOICES):
        best = tl.argmax(left, 0)  # of equal ones the first
        chosen = tl.where(choice == j, best, chosen)
        largest = tl.where(choice == j, tl.max(tl.where(expert == best, logits, float("-inf")), 0), largest)
        left = tl.where(expert == best, float("-inf"), left)
    if SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-largest))
    else:
        greatest = tl.max(logits, 0)
        weights = tl.exp(largest - greatest) / tl.sum(tl.exp(logits - greatest), 0)
    if NORMALIZED:
        weights /= tl.sum(weights, 0)
    valid, to = choice < CHOICES, token * CHOICES + choice
    tl.store(experts_ptr + to, chosen, mask=valid)
    tl.store(weights_ptr + to, weights, mask=valid)


@triton.jit
def combine_kernel(
    y_ptr,  # [t * CHOICES, n]
    weights_ptr,  # float32 [t, CHOICES]
    residual_ptr,  # [t, n]
    out_ptr,  # [t, n]
    n,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (token, block of columns)."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid, to = column < n, token * n + column
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(CHOICES):
        y = tl.load(y_ptr + (token * CHOICES + j) * n + column, mask=valid, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + token * CHOICES + j) * y
    total += tl.load(residual_ptr + to, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=valid)
