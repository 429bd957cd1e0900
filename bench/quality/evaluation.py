"""How far a network with other weights is from the network as it is: perplexity, KL divergence and top-1 agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from llmpq.measure.text import digest, evenly


@dataclass(frozen=True)
class Windows:
    """A text, cut into disjoint windows of equal length. Each predicts all its tokens but the first."""

    name: str
    token_ids: torch.Tensor  # int64 [windows, length]

    @classmethod
    def spread(cls, name: str, token_ids: Sequence[int], count: int, length: int) -> Windows:
        """At most `count` windows, evenly from all over the text. Raises ValueError if it is shorter than one."""
        pieces = torch.tensor(token_ids[: len(token_ids) // length * length]).view(-1, length)
        if not len(pieces):
            raise ValueError(f"the text {name} has {len(token_ids)} tokens, which is less than a window of {length}")
        return cls(name, pieces[evenly(range(len(pieces)), count)])

    @property
    def digest(self) -> str:
        return digest(repr(self.token_ids.tolist()))

    @property
    def predictions(self) -> int:
        return len(self.token_ids) * (self.token_ids.shape[1] - 1)


@dataclass(frozen=True)
class Quality:
    """Over all predictions of a text; `kl` in nats per token, from the network as it is."""

    perplexity: float
    kl: float
    top1: float  # fraction of predictions with the same most likely token


class Evaluator:
    """A network and what it says of some texts, kept in a folder: a file of float32 logits for each text."""

    def __init__(self, network: Any, texts: Sequence[Windows], folder: Path) -> None:
        self._network, self._texts = network, texts
        self._reference = {text.name: self._load(text, folder) for text in texts}

    def _load(self, text: Windows, folder: Path) -> torch.Tensor:
        path = folder / f"logits-{text.digest}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, torch.stack([self._logits(window, {}) for window in text.token_ids]).numpy())
            partial.rename(path)
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    def measure(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Quality]:
        """The quality on each text with these weights (linears' names, without ".weight") in place of the network's."""
        return {text.name: self._measure(text, weights) for text in self._texts}

    def _measure(self, text: Windows, weights: Mapping[str, torch.Tensor]) -> Quality:
        sums = torch.zeros(3, dtype=torch.float64)
        for window, reference in zip(text.token_ids, self._reference[text.name], strict=True):
            sums += compare(self._logits(window, weights), reference, window[1:])
        loss, kl, same = (sums / text.predictions).tolist()
        return Quality(float(torch.tensor(loss).exp()), kl, same)

    @torch.inference_mode()
    def _logits(self, window: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 [length - 1, vocabulary]."""
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        output = torch.func.functional_call(self._network, named, (window[None],))
        logits: torch.Tensor = output.logits
        return logits[0, :-1].float()


def compare(logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64 [3]: sums over rows of -log p(target), KL(reference || logits) and equal maxima."""
    found, expected = F.log_softmax(logits, -1), F.log_softmax(reference, -1)
    loss = -found.gather(1, targets[:, None]).double().sum()
    kl = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).double().sum()
    return torch.stack([loss, kl, (found.argmax(-1) == expected.argmax(-1)).double().sum()])


def fields(quality: Mapping[str, Quality]) -> dict[str, float]:
    """Of the first text as they are called, of the others with the text's name before it."""
    first = next(iter(quality))
    return {
        key if name == first else f"{name}_{key}": value
        for name, found in quality.items()
        for key, value in asdict(found).items()
    }
