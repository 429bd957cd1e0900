"""GPTQ with corrected targets, refitted scales and coordinate descent: codes chosen for the inputs that a linear gets.

A weight W [n, k] with inputs x is quantized to Q such that mean |T - Q x|^2 is small, row by row. With H = mean x x^T
that is, but for a constant, (W* - Q) H (W* - Q)^T, where W* = W + mean (T - W x) x^T H^-1 solves the least squares
problem without rounding. In turn:

1. W* takes half of the way from W. T is what the linear gives in the model as it is, while x comes from layers that
   are quantized already: so a linear makes good some of what those before it did.
2. GPTQ (arXiv 2210.17323): columns are rounded one after the other, and what rounding one changes is made good in the
   columns that are left, by the Cholesky factor of H^-1. The scale of a group is searched when its first column is
   reached, each error weighted by what it costs in the end.
3. Twice: the scale of every group, and its offset, by least squares on H; then every code moves to the best place
   beside all others (coordinate descent).

All rows share H and its factors; otherwise they do not depend on each other.
"""

from __future__ import annotations

import torch

from llmpq.quant.packing import pack
from llmpq.quant.rtn import inverse, stored
from llmpq.quant.tensor import InputStatistics, QuantTensor
from llmpq.spec import Precision

DAMPING = 0.01  # of H's mean diagonal, added to it at most: the inputs seen are a sample
OWN_DAMPING = 0.3  # of a channel's own mean square, at most likewise: of a small one 1 % of the mean is many times that
LEAST_DAMPING = 1e-5  # of H's mean diagonal, added in any case: a channel may have had no inputs
CORRECTION = 0.5  # of the way from W to the least squares solution, which is fitted to that sample
ROUNDS = 2  # of refitting and coordinate descent
# Scales to try, as fractions of that which clips nothing. Less than a half helps where channels differ much in size.
CLIP_RATIOS = (*(1.0 - 0.025 * step for step in range(17)), 0.52, 0.44, 0.36, 0.28, 0.2)
BLOCK = 64  # columns after which what is left to correct in all others is added up
WEIGHTS = 2**21  # that are worked on at a time


def quantize_for_inputs(
    weight: torch.Tensor, precision: Precision, scale_dtype: torch.dtype, inputs: InputStatistics | None
) -> QuantTensor:
    """Quantize a floating-point weight [n, k] for these inputs.

    Raises ValueError without any, and for values that are not finite.
    """
    if inputs is None:
        raise ValueError("gptq quantizes for inputs, and none are given")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds values that are not finite")
    n, k = weight.shape
    scale = inputs.second_moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    h = inputs.second_moment / scale
    h = h + damping(h.diagonal()).diag()
    factor = torch.linalg.cholesky(h)
    chain = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    target = weight
    if inputs.drift is not None:
        target = weight + torch.cholesky_solve(inputs.drift.T / scale, factor).T.mul_(CORRECTION)
    at_a_time = target.split(max(1, WEIGHTS // k))
    parts = [_Columns(rows, h.float(), chain, precision, scale_dtype).quantize() for rows in at_a_time]
    codes, scales, zeros = (torch.cat(tensors).contiguous() for tensors in zip(*parts))
    qweight = pack(codes.to(torch.uint8), precision.bits)
    kept = {"sym": None, "asym": zeros.to(torch.uint8), "offset": zeros.to(scale_dtype)}[precision.zero]
    return QuantTensor(qweight, scales.to(scale_dtype), kept, precision, (n, k))


def damping(mean_squares: torch.Tensor) -> torch.Tensor:
    """What is added to the diagonal [k] of H, which is 1 on average."""
    return (OWN_DAMPING * mean_squares).clamp(max=DAMPING) + LEAST_DAMPING


class _Columns:
    """Some rows of a weight while they are quantized; transposed, so that a column lies together.

    A value is scale * (code - zero) + offset, where only an "offset" precision has another offset than 0.
    """

    def __init__(
        self, target: torch.Tensor, h: torch.Tensor, chain: torch.Tensor, precision: Precision, dtype: torch.dtype
    ) -> None:
        self._target = target.T.float().contiguous()  # [k, rows]
        self._h, self._chain = h, chain  # [k, k]: H; U with U^T U = H^-1, upper triangular
        self._precision, self._dtype = precision, dtype
        k, rows = self._target.shape
        self._group = precision.group_size or k
        self._codes = torch.empty(k, rows)
        shape = (precision.num_groups(k), rows)
        self._scale, self._zero, self._offset = torch.empty(shape), torch.empty(shape), torch.zeros(shape)

    def quantize(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [rows, k]; scales, and zeros or offsets, [rows, groups]: float32."""
        self._round_in_turn()
        error = self._h @ (self._target - self._values())  # [k, rows]: H times what is wrong, kept true from here on
        for _ in range(ROUNDS):
            self._refit(error)
            self._descend(error)
        self._refit(error)
        zeros = self._offset if self._precision.zero == "offset" else self._zero
        return self._codes.T, self._scale.T, zeros.T

    def _groups(self) -> list[slice]:
        k = len(self._target)
        return [slice(start, min(start + self._group, k)) for start in range(0, k, self._group)]

    def _values(self) -> torch.Tensor:
        k, g = len(self._target), self._group
        scale, zero, offset = (x.repeat_interleave(g, 0)[:k] for x in (self._scale, self._zero, self._offset))
        return (self._codes - zero).mul_(scale).add_(offset)

    def _round_in_turn(self) -> None:
        """GPTQ: round each column, and make good what that changes in the later ones."""
        left, k, levels = self._target.clone(), len(self._target), 2**self._precision.bits - 1
        for start in range(0, k, BLOCK):
            stop = min(start + BLOCK, k)
            errors = torch.empty(stop - start, left.shape[1])
            for j in range(start, stop):
                group = j // self._group
                if j % self._group == 0:
                    self._search(group, left[j : j + self._group])
                scale, zero, offset = self._scale[group], self._zero[group], self._offset[group]
                code = (left[j] - offset).mul_(inverse(scale)).add_(zero).round_().clamp_(0, levels)
                self._codes[j] = code
                errors[j - start] = (left[j] - (code - zero).mul_(scale).add_(offset)) / self._chain[j, j]
                left[j + 1 : stop].addr_(self._chain[j, j + 1 : stop], errors[j - start], alpha=-1)
            left[stop:].addmm_(self._chain[start:stop, stop:].T, errors, alpha=-1)

    def _search(self, group: int, weights: torch.Tensor) -> None:
        """The scale, zero and offset [rows] with the least weighted error over the columns [size, rows] of a group."""
        first = group * self._group
        importance = self._chain.diagonal()[first : first + len(weights), None].reciprocal().square()
        levels, kind = 2**self._precision.bits - 1, self._precision.zero
        low, high = weights.amin(0), weights.amax(0)
        if kind == "sym":
            middle = 2 ** (self._precision.bits - 1)
            widest = torch.where(-low > high, low, high) / -middle  # the sign gives the largest the code to spare
            zero = torch.full_like(low, middle)
        elif kind == "asym":
            low, high = low.clamp(max=0), high.clamp(min=0)
            widest = (high - low) / levels
            zero = (-low * inverse(widest)).round_()
        else:
            widest, zero = (high - low) / levels, torch.zeros_like(low)
        least = torch.full_like(low, torch.inf)
        for ratio in CLIP_RATIOS:
            scale, offset = stored(widest * ratio, self._dtype), torch.zeros_like(low)
            if kind == "offset":
                offset = stored((low + high - levels * scale) / 2, self._dtype)
            codes = (weights - offset).mul_(inverse(scale)).add_(zero).round_().clamp_(0, levels)
            error = codes.sub_(zero).mul_(scale).add_(offset).sub_(weights).square_().mul_(importance).sum(0)
            better = error < least
            least = torch.where(better, error, least)
            self._scale[group] = torch.where(better, scale, self._scale[group])
            self._offset[group] = torch.where(better, offset, self._offset[group])
        self._zero[group] = zero

    def _refit(self, error: torch.Tensor) -> None:
        """Scale and offset of each group by least squares on H, the other groups as they are."""
        for group, columns in enumerate(self._groups()):
            levels = self._codes[columns] - self._zero[group]
            moved = self._h[:, columns] @ levels  # [k, rows]: H times what one more of scale adds
            a, p = (levels * moved[columns]).sum(0), (levels * error[columns]).sum(0)
            shifts = self._h[:, columns].sum(1, keepdim=True)  # the same for the offset
            if self._precision.zero == "offset":
                b, c, q = moved[columns].sum(0), shifts[columns].sum(), error[columns].sum(0)
                determinant = a * c - b.square()
                scale = self._scale[group] + (c * p - b * q) / determinant
                offset = self._offset[group] + (a * q - b * p) / determinant
            else:
                b = c = q = torch.zeros_like(a)
                scale, offset = self._scale[group] + p / a, self._offset[group]
            ds = stored(scale, self._dtype) - self._scale[group]
            do = stored(offset, self._dtype) - self._offset[group]
            change = a * ds.square() + 2 * b * ds * do + c * do.square() - 2 * (p * ds + q * do)
            better = change < 0  # rounding may spoil it; NaN where a group is all zero
            ds, do = ds.where(better, torch.zeros(())), do.where(better, torch.zeros(()))
            self._scale[group] += ds
            self._offset[group] += do
            error -= moved.mul_(ds).add_(shifts * do)

    def _descend(self, error: torch.Tensor) -> None:
        """Each code to where it is best beside all others as they are, in the order of the columns."""
        k, levels = len(self._target), 2**self._precision.bits - 1
        for start in range(0, k, BLOCK):
            stop = min(start + BLOCK, k)
            near, moves = error[start:stop].clone(), torch.empty(stop - start, error.shape[1])
            for j in range(start, stop):
                scale = self._scale[j // self._group]
                wanted = (near[j - start] / self._h[j, j]).mul_(inverse(scale)).add_(self._codes[j])
                code = wanted.round_().clamp_(0, levels)
                moves[j - start] = (code - self._codes[j]).mul_(scale)
                self._codes[j] = code
                near.addr_(self._h[start:stop, j], moves[j - start], alpha=-1)
            error.addmm_(self._h[:, start:stop], moves, alpha=-1)
