"""The Triton kernel that draws tokens; llmpq/kernels/backends/triton_draw.py launches it.

A program draws the token of one row, in passes over its logits. What top_k and top_p leave is found without sorting:
logits have the order of their bits, taken as integers (`_order`), and the least of those that stay is found bit by bit,
by the number or the weight of all that are no less.
"""

import triton
import triton.language as tl


@triton.jit
def _order(bits_ptr, column, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Integers in the order of the logits of these columns, int64; below all others where there is none."""
    bits = tl.load(bits_ptr + column, mask=column < SIZE, other=0).to(tl.int64)
    largest: tl.constexpr = (1 << (BITS - 1)) - 1
    ordered = tl.where(bits < 0, -1 - (bits & largest), bits)  # negative numbers fall as their bits rise; -0 is near 0
    return tl.where(column < SIZE, ordered, -(1 << BITS))


@triton.jit
def _first_of_equal(equal, left):
    """Which of a block's equal ones are the first `left` of them, and how many more there may be."""
    before = tl.cumsum(equal.to(tl.int32), 0) - equal.to(tl.int32)
    return equal & (before < left), left - tl.sum(equal.to(tl.int32), 0)


@triton.jit
def draw_kernel(
    x_ptr,  # [rows, SIZE], rows x_stride elements apart
    bits_ptr,  # the same as integers
    weights_ptr,  # float64 [rows, SIZE]: scratch
    parameters_ptr,  # float64 [4, rows]: temperature, top_k, top_p, min_p
    numbers_ptr,  # float64 [rows]
    tokens_ptr,  # int64 [rows]
    x_stride,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x_ptr, bits_ptr, weights_ptr = x_ptr + row * x_stride, bits_ptr + row * x_stride, weights_ptr + row * SIZE
    rows = tl.num_programs(0)
    temperature, top_k = tl.load(parameters_ptr + row), tl.load(parameters_ptr + rows + row).to(tl.int32)
    top_p, min_p = tl.load(parameters_ptr + 2 * rows + row), tl.load(parameters_ptr + 3 * rows + row)
    if temperature > 0:
        greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, SIZE, BLOCK):
            column = start + lane
            greatest = tl.maximum(
                greatest, tl.load(x_ptr + column, mask=column < SIZE, other=float("-inf")).to(tl.float32)
            )
        most = tl.max(greatest, 0).to(tl.float64)

        # The k-th greatest: the largest `least` of which so many are no less.
        least = -(1 << BITS) + tl.zeros((), tl.int64)
        left = 0
        if (top_k > 0) & (top_k < SIZE):
            bit = (1 << (BITS - 1)) + tl.zeros((), tl.int64)
            least = -bit
            for _ in range(BITS):
                tried = least + bit
                bit = bit >> 1
                count = tl.zeros((BLOCK,), tl.int32)
                for start in range(0, SIZE, BLOCK):
                    count += (_order(bits_ptr, start + lane, SIZE, BITS) >= tried).to(tl.int32)
                least = tl.where(tl.sum(count, 0) >= top_k, tried, least)
            count = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, SIZE, BLOCK):
                count += (_order(bits_ptr, start + lane, SIZE, BITS) > least).to(tl.int32)
            left = top_k - tl.sum(count, 0)

        # Weights of those; with top_p, min_p is for later.
        total, floor = tl.zeros((), tl.float64), tl.where(top_p < 1, 0.0, min_p)
        for start in range(0, SIZE, BLOCK):
            column = start + lane
            order = _order(bits_ptr, column, SIZE, BITS)
            first, left = _first_of_equal(order == least, left)
            x = tl.load(x_ptr + column, mask=column < SIZE, other=float("-inf")).to(tl.float64)
            weight = tl.where((order > least) | first, tl.exp((x - most) / temperature), 0.0)
            weight = tl.where(weight >= floor, weight, 0.0)
            tl.store(weights_ptr + column, weight, mask=column < SIZE)
            total += tl.sum(weight, 0)
        tl.debug_barrier()  # each thread may read what another has written

        # The fewest with the share top_p: one stays while those before it have not reached it.
        if top_p < 1:
            wanted, bit = top_p * total, (1 << (BITS - 1)) + tl.zeros((), tl.int64)
            least = -bit
            for _ in range(BITS):
                tried = least + bit
                bit = bit >> 1
                mass = tl.zeros((BLOCK,), tl.float64)
                for start in range(0, SIZE, BLOCK):
                    column = start + lane
                    weight = tl.load(weights_ptr + column, mask=column < SIZE, other=0.0)
                    mass += tl.where(_order(bits_ptr, column, SIZE, BITS) >= tried, weight, 0.0)
                least = tl.where(tl.sum(mass, 0) >= wanted, tried, least)
            mass, each = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
            for start in range(0, SIZE, BLOCK):
                column = start + lane
                order = _order(bits_ptr, column, SIZE, BITS)
                weight = tl.load(weights_ptr + column, mask=column < SIZE, other=0.0)
                mass += tl.where(order > least, weight, 0.0)
                each = tl.maximum(each, tl.where(order == least, weight, 0.0))
            share = tl.max(each, 0)
            missing = tl.where(share > 0, (wanted - tl.sum(mass, 0)) / share, 0.0)
            left = tl.ceil(tl.minimum(missing, SIZE)).to(tl.int32)
            total = tl.zeros((), tl.float64)
            for start in range(0, SIZE, BLOCK):
                column = start + lane
                order = _order(bits_ptr, column, SIZE, BITS)
                weight = tl.load(weights_ptr + column, mask=column < SIZE, other=0.0)
                first, left = _first_of_equal(order == least, left)
                weight = tl.where(((order > least) | first) & (weight >= min_p), weight, 0.0)
                tl.store(weights_ptr + column, weight, mask=column < SIZE)
                total += tl.sum(weight, 0)
            tl.debug_barrier()

        chosen, last, before = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.float64)
        wanted = tl.load(numbers_ptr + row) * total
        for start in range(0, SIZE, BLOCK):
            column = start + lane
            weight = tl.load(weights_ptr + column, mask=column < SIZE, other=0.0)
            reached = before + tl.cumsum(weight, 0)
            chosen += tl.sum(((reached <= wanted) & (column < SIZE)).to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), 0))
            before += tl.sum(weight, 0)
        tl.store(tokens_ptr + row, tl.minimum(chosen, last).to(tl.int64))
