"""How far what is served is from the model in 16 bits: in perplexity, in distributions, and in the likeliest token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llmpq.measure.perplexity import Perplexity, mean_and_error
from llmpq.measure.reference_model import ReferenceModel
from llmpq.progress import Notify, counted, silent
from llmpq.spec import Record

LogitsFn = Callable[[Sequence[int]], npt.NDArray[np.float32]]

_BYTES = 2**25  # of float64 log-probabilities at once


@dataclass(frozen=True, slots=True)
class Divergence(Record):
    """What is served against the reference, over the predicted tokens of a text.

    KL is the Kullback-Leibler divergence, in nats, of the served distribution of a next token from the reference's. An
    `_error` is the standard error of the mean before it, by how much windows differ.
    """

    reference_perplexity: float
    perplexity_increase: float  # relative: 0.01 is 1 %
    perplexity_increase_error: float
    kl: float
    kl_error: float
    kl_999: float  # a thousandth of the tokens have more
    top1_agreement: float  # the share of tokens in whose place both find the same one the likeliest


def measure_divergence(
    logits: LogitsFn, reference: ReferenceModel, notify: Notify = silent
) -> tuple[Perplexity, Divergence]:
    """Perplexity of what is served, and how far that is from the reference, over the reference's windows.

    `logits` takes a window of t tokens and returns those after each but the last, float32 [t - 1, vocab_size]
    (`Engine.logits`). One window's are held at a time.
    """
    log_probs: list[list[float]] = []  # of each window
    increases: list[list[float]] = []
    divergences: list[list[float]] = []
    agreements: list[float] = []
    window_done = counted(notify, "comparing with 16 bits", len(reference.windows))
    for i, window in enumerate(reference.windows):
        served = logits(window)
        rows = max(1, _BYTES // (8 * served.shape[1]))
        for values in (log_probs, increases, divergences):
            values.append([])
        for start in range(0, len(served), rows):
            stop = min(start + rows, len(served))
            expected = reference.logits(i, start, stop)
            found = torch.from_numpy(served[start:stop].copy())
            agreements += (expected.argmax(-1) == found.argmax(-1)).double().tolist()
            p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
            divergences[-1] += (p.exp() * (p - q)).sum(-1).tolist()
            targets = torch.tensor(window[start + 1 : stop + 1])[:, None]
            log_probs[-1] += q.gather(1, targets)[:, 0].tolist()
            increases[-1] += (p - q).gather(1, targets)[:, 0].tolist()
        window_done()
    perplexity = Perplexity.of(log_probs, max(map(len, reference.windows)))
    increase, increase_error = mean_and_error(increases)
    kl, kl_error = mean_and_error(divergences)
    return perplexity, Divergence(
        reference_perplexity=perplexity.perplexity / math.exp(increase),
        perplexity_increase=math.expm1(increase),
        perplexity_increase_error=math.exp(increase) * increase_error,
        kl=kl,
        kl_error=kl_error,
        kl_999=float(np.quantile(np.concatenate(divergences), 0.999)),
        top1_agreement=math.fsum(agreements) / len(agreements),
    )
