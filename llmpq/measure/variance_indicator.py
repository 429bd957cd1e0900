"""The variance indicator of LLM-PQ (arXiv 2403.01136, section 4): noise that follows from quantization steps alone.

Quantizing a linear adds noise to its output whose variance follows from the quantization steps and the inputs. With
scales for groups of weights, the noise that token t finds in an output element is, on average over the n outputs,

    nu_t = 1/n * sum over rows r and columns i of  S[r, g(i)]^2 / 12 * x[t, i]^2

where S is the step of the group that holds weight (r, i): its range over 2^bits - 1. A rounding error is uniform over
a step, hence 1/12. The paper has two forms. For stochastic rounding, x counts by E[X]^2 + Var[X], which is the mean of
x^2, and by 1/6 in place of 1/12. For deterministic rounding, x counts by Var[X], and by 1/4: its mean is taken off each
token's inputs first. (In truth, the error meets the mean of the input, too.) Their code keeps one sample's statistics;
here every token counts. The paper adds this up over a layer's linears: the methods "variance" and
"variance-deterministic". It has nothing for embedding and head; theirs is the noise of an element, and of a logit.
"variance-relative" is ours: nu as above, in nats by relative_noise.py.

The embedding's rows are copied, not multiplied (the input is one-hot): the noise of an element is its S^2 / 12 itself.
16 bit adds no noise: 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from llmpq.checkpoint.tensor_names import Part
from llmpq.checkpoint.weights import WeightSource, floating
from llmpq.measure.relative_noise import added, propagated
from llmpq.models.linear import QuantLinear
from llmpq.models.step import Step
from llmpq.progress import Notify, silent
from llmpq.spec import ModelSpec, Precision


def variance(
    source: WeightSource,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    token_ids: Sequence[int],
    notify: Notify = silent,
    *,
    deterministic: bool = False,
    relative: bool = False,
) -> dict[str, dict[str, float]]:
    """omega[unit][precision] by the paper's formula, or `relative` to what the noise disturbs. Holds a unit at a time.

    `token_ids` are cut into equal sequences.
    """
    omega: dict[str, dict[str, float]] = {unit: {} for unit in spec.units}
    for like in {(p.group_size, p.zero): p for p in precisions}.values():
        noise = _StepNoise(source, spec, like, deterministic)
        base = (propagated if relative else added)(noise, spec, token_ids, notify)
        factor = 1.0 if relative else 3.0 if deterministic else 2.0  # 1/4 or 1/6 for 1/12
        for p in precisions:
            if (p.group_size, p.zero) == (like.group_size, like.zero):
                for unit in spec.units:
                    omega[unit][str(p)] = factor * base[unit][0] / float(2**p.bits - 1) ** 2
    return omega


class _StepNoise:
    """Noise of a step S that is a group's whole range. It is its own source: it notes the rows that are read from it.

    Matrices are [n, k].
    """

    def __init__(self, source: WeightSource, spec: ModelSpec, precision: Precision, deterministic: bool) -> None:
        self.source = self
        self.cacheable = source.cacheable
        self._source, self._spec, self._precision, self._deterministic = source, spec, precision, deterministic
        self._columns: dict[Part, torch.Tensor] = {}  # [experts, k], float64: S^2 / 12 summed over an expert's rows
        self._rows_noise: dict[Part, list[torch.Tensor]] = {}  # [n] in portions: the mean of S^2 / 12 over a row
        self._rows_square: dict[Part, list[torch.Tensor]] = {}  # [n] in portions: the mean square of a row

    def rows(self, unit: str, part: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        for record in (self._columns, self._rows_noise, self._rows_square):
            record.pop((unit, part), None)  # a tied table is read again for the head
        shape, at = self._spec.linears(unit).get(part.removesuffix(".weight")), start
        for portion in map(floating, self._source.rows(unit, part, start, stop)):
            if shape is not None:
                self._note((unit, part), portion.float(), torch.arange(at, at + len(portion)) // shape.n, shape.experts)
            at += len(portion)
            yield portion

    def _note(self, matrix: Part, rows: torch.Tensor, experts: torch.Tensor, count: int) -> None:
        """Rows of a matrix, and which of `count` experts each is of."""
        n, k = rows.shape
        group = self._precision.group_size or k
        padded = torch.nn.functional.pad(rows, (0, -k % group), value=0.0) if k % group else rows
        groups = padded.view(n, -1, group)
        if self._precision.zero == "sym":
            span = 2 * groups.abs().amax(-1)
        elif self._precision.zero == "offset":
            low, high = groups.aminmax(dim=-1)
            if k % group:  # what fills up the last group is no weight
                low[:, -1], high[:, -1] = rows[:, -(k % group) :].aminmax(dim=-1)
            span = high - low
        else:  # zero is representable, which keeps the zero point in range
            span = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
        variance = span.square() / 12
        sums = torch.zeros(count, variance.shape[1], dtype=torch.float64).index_add_(0, experts, variance.double())
        columns = sums.repeat_interleave(group, 1)[:, :k]
        widths = torch.full((variance.shape[1],), float(group))
        widths[-1] = k - group * (len(widths) - 1)
        self._columns[matrix] = self._columns.get(matrix, 0) + columns
        self._rows_noise.setdefault(matrix, []).append(variance @ widths / k)
        self._rows_square.setdefault(matrix, []).append(rows.square().mean(-1))

    def embedded(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        table = ("embedding", "table.weight")
        noise, square = torch.cat(self._rows_noise[table]), torch.cat(self._rows_square[table])
        relative = noise[step.tokens] / square[step.tokens].clamp_min(1e-30)
        return (relative.double() * hidden_states.square().mean(-1))[None]

    def linear(self, unit: str, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self._squared(x) @ self._columns[unit, f"{name}.weight"][0] / y.shape[-1])[None]

    def experts(self, unit: str, name: str, x: torch.Tensor, experts: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        of_expert = self._squared(x) @ self._columns[unit, f"{name}.weight"].T / y.shape[-1]  # [rows of x, experts]
        choices = experts.long().view(len(x), -1)
        return of_expert.gather(1, choices).flatten()[None]

    def head(self, x: torch.Tensor, table: QuantLinear) -> torch.Tensor:
        part = ("embedding" if self._spec.tied_embeddings else "head", "table.weight")
        return (self._squared(x).mean(0) @ self._columns[part][0] / self._spec.vocab_size)[None]

    def _squared(self, x: torch.Tensor) -> torch.Tensor:
        if self._deterministic:
            x = x - x.mean(-1, keepdim=True)
        return x.double().square()
