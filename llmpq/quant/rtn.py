"""Round-to-nearest with a search for each group's scale and offset. Needs no data but the weights."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from llmpq.quant.packing import pack, packed_words
from llmpq.quant.tensor import QuantTensor, numbers_at_once, zeros_dtype
from llmpq.spec import Precision

# Scales to try, as fractions of the one that clips nothing. The fewer the levels, the more it pays to clip a group's
# largest weights so that the others get finer steps; with 8 bits it does not pay.
CLIP_RATIOS = {3: (1.0, 0.92, 0.85, 0.78, 0.71, 0.64), 4: (1.0, 0.94, 0.88, 0.82), 8: (1.0,)}


def round_to_nearest(weight: torch.Tensor, precision: Precision, scale_dtype: torch.dtype) -> QuantTensor:
    """Quantize a floating-point weight [n, k]; every group gets the scale of least squared error that was found.

    Never worse in any group than the scale that maps the largest weight to the last code; with an offset, than the
    scale and offset that map the range of the weights to that of the codes. Rows do not depend on each other.
    Temporaries take a few MB on a CPU and 0.1 GB on a GPU, whatever the size of the weight. The result is where the
    weight is, and has the same bits on every device: each operation is one that IEEE 754 defines, in a fixed order.
    Raises ValueError for values that are not finite.
    """
    n, k = weight.shape
    group, num_groups, device = precision.group_size or k, precision.num_groups(k), weight.device
    qweight = torch.empty(n, packed_words(k, precision.bits), dtype=torch.int32, device=device)
    scales = torch.empty(n, num_groups, dtype=scale_dtype, device=device)
    kind = zeros_dtype(precision, scale_dtype)
    zeros = None if kind is None else torch.empty(n, num_groups, dtype=kind, device=device)
    step = max(1, numbers_at_once(device) // k)
    for rows in (slice(start, min(start + step, n)) for start in range(0, n, step)):
        # A short last group is filled up with zeros: they are exact at any scale, so they change no decision. With an
        # offset they would not be exact, and are left out. What is done to groups goes over whole rows of numbers if
        # their elements are apart.
        padded = pad(weight[rows].to(torch.float32), (0, -k % group)).view(-1, group)
        groups = padded.T.contiguous().view(group, -1, num_groups)
        if precision.zero == "offset":
            used = None
            if k % group:
                used = torch.arange(num_groups * group, device=device).view(num_groups, group).T[:, None] < k
            codes, scales[rows], zero = _quantize_with_offset(groups, used, precision.bits, scale_dtype)
        else:
            codes, scales[rows], zero = _quantize_groups(groups, precision, scale_dtype)
        codes = codes.view(group, -1).T.reshape(-1, num_groups * group)
        qweight[rows] = pack(codes[:, :k], precision.bits)
        if zeros is not None:
            zeros[rows] = zero
    return QuantTensor(qweight, scales, zeros, precision, (n, k))


def _sum(columns: torch.Tensor) -> torch.Tensor:
    """The sums over the first dim, in pairs: torch's own adds in an order that differs between devices."""
    while (size := len(columns)) > 1:
        pairs = size // 2
        sums = columns[:pairs] + columns[size - pairs :]
        columns = torch.cat((sums, columns[pairs : size - pairs])) if size % 2 else sums
    return columns[0]


def _quotient(numerator: torch.Tensor, denominator: float) -> torch.Tensor:
    """Of two tensors, since a GPU's quotient with a Python number is a product with a rounded reciprocal."""
    return numerator / torch.full_like(numerator, denominator)


def _quantize_groups(
    groups: torch.Tensor, precision: Precision, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [size, r, groups], scales and zeros float32 [r, groups] of float32 weights [size, r, groups]."""
    levels = 2**precision.bits - 1
    low, high = groups.aminmax(dim=0)
    _check_finite(low, high)
    if precision.zero == "sym":
        # There is one code more below zero than above. The sign of the scale gives it to the largest weight.
        zero = torch.full_like(low, 2 ** (precision.bits - 1))
        largest = torch.where(-low > high, low, high)
        widest, plain = largest / -zero, largest.abs() / (levels - zero)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        widest = plain = _quotient(high - low, levels)
        zero = (-low / widest).nan_to_num_(0.0).round_()  # 0 / 0: a group of zeros
    scale = _least_squares_scale(groups, widest, zero, precision.bits)
    codes, scale, error = _round(groups, scale, zero, levels, scale_dtype)
    plain_codes, plain_scale, plain_error = _round(groups, plain, zero, levels, scale_dtype)
    keep = error <= plain_error
    codes = torch.where(keep, codes, plain_codes).add_(zero)
    return codes.to(torch.uint8), torch.where(keep, scale, plain_scale), zero


def _check_finite(low: torch.Tensor, high: torch.Tensor) -> None:
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("weight holds values that are not finite")


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that is not finite: weights so small become the code of zero."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(~inverse.isfinite(), 0)


def _nearest(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    """Codes less zero, float32 [size, r, groups]."""
    return (groups * inverse(scale)).round_().clamp_(-zero, levels - zero)


def _least_squares_scale(groups: torch.Tensor, widest: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """For each clip ratio, take its codes q and the scale s = <w, q> / <q, q> that suits them best; keep the best.

    With that s the squared error is <w, w> - <w, q>**2 / <q, q>, so neither s * q nor the error is ever formed.
    """
    best_scale, best_gain = widest, torch.zeros_like(widest)
    for ratio in CLIP_RATIOS[bits]:
        codes = _nearest(groups, widest * ratio, zero, 2**bits - 1)
        norm = _sum(codes.square()).clamp_(min=1)
        product = _sum(codes.mul_(groups))
        gain = product.square() / norm
        best_scale = torch.where(gain > best_gain, product / norm, best_scale)
        best_gain = torch.maximum(gain, best_gain)
    return best_scale


def _round(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes less zero at `scale` as it will be stored, that scale, and the squared error of each group."""
    scale = stored(scale, scale_dtype)
    codes = _nearest(groups, scale, zero, levels)
    return codes, scale, _sum((codes * scale).sub_(groups).square_())


def stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values as `dtype` holds them; those beyond its range become its largest."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).to(torch.float32)


def _used(numbers: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
    """`numbers`, with 0 where there is no weight, in place."""
    return numbers if used is None else numbers.mul_(used)


def _quantize_with_offset(
    groups: torch.Tensor, used: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [size, r, groups], scales and offsets float32 [r, groups] of weights float32 [size, r, groups].

    `used` bool [size, 1, groups] says which weights there are, None that all are. For each clip ratio, the codes q are
    those of a range around the middle; scale and offset that suit them best are a line through the points (q, w):
    s = cov(w, q) / var(q) and mean(w) - s * mean(q). The squared error is then var(w) - cov(w, q)**2 / var(q).
    """
    levels = 2**bits - 1
    if used is None:
        low, high = groups.aminmax(dim=0)
        counts = torch.full_like(low, len(groups))
    else:
        low, high = groups.masked_fill(~used, torch.inf).amin(0), groups.masked_fill(~used, -torch.inf).amax(0)
        counts = used.sum(0)
    _check_finite(low, high)
    middle, step = low * 0.5 + high * 0.5, _quotient(high, levels) - _quotient(low, levels)
    weights = _used(groups - middle, used)  # around the middle, so that a far offset costs no digits
    mean = _sum(weights) / counts
    best_scale, best_code, best_gain = step, torch.full_like(step, levels / 2), torch.zeros_like(step)
    for ratio in CLIP_RATIOS[bits]:
        codes = (weights * inverse(step * ratio)).add_(levels / 2).round_().clamp_(0, levels)
        code = _sum(_used(codes, used)) / counts
        _used(codes.sub_(code), used)
        norm, product = _sum(codes.square()), _sum(codes.mul_(weights))
        gain = (product.square() / norm).nan_to_num_(0.0)
        better = gain > best_gain
        best_scale, best_code = torch.where(better, product / norm, best_scale), torch.where(better, code, best_code)
        best_gain = torch.maximum(gain, best_gain)
    del weights, codes  # there is as much to hold for rounding
    found = stored(best_scale, dtype)
    codes, offset, error = _round_with_offset(groups, used, found, middle + mean - found * best_code, levels, dtype)
    plain = stored(step, dtype)
    plain_codes, plain_offset, plain_error = _round_with_offset(groups, used, plain, low, levels, dtype)
    keep = error <= plain_error
    codes = torch.where(keep, codes, plain_codes)
    return codes.to(torch.uint8), torch.where(keep, found, plain), torch.where(keep, offset, plain_offset)


def _round_with_offset(
    groups: torch.Tensor,
    used: torch.Tensor | None,
    scale: torch.Tensor,
    offset: torch.Tensor,
    levels: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, the offset as it will be stored, and the squared error of each group."""
    offset = stored(offset, dtype)
    codes = (groups - offset).mul_(inverse(scale)).round_().clamp_(0, levels)
    return codes, offset, _sum(_used((codes * scale).add_(offset).sub_(groups), used).square_())
