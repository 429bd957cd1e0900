"""Tokens that a device has chosen and the host has not read: the next step takes them where they are."""

from __future__ import annotations

import torch

from llmpq.models.step import Step


class Unread:
    """Values of a step that is on its way on a device, as they are when the device gets there."""

    def __init__(self, values: torch.Tensor) -> None:
        """`values` may be written anew by what the device is told to do after this."""
        on_gpu = values.is_cuda
        self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> torch.Tensor:
        """The values on the CPU; on a GPU it is waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class LatestTokens:
    """The token that was chosen last for each slot, on the device. Nothing is allocated there after the first step."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._tokens, self._places, self._found = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3)
        )

    def of(self, step: Step) -> torch.Tensor:
        """int64 [s] of a step's sequences, valid until the next call."""
        found = self._found[: step.num_sequences]
        torch.index_select(self._tokens, 0, self._of_slots(step), out=found)
        return found

    def keep(self, step: Step, tokens: torch.Tensor) -> None:
        """`tokens`, int64 [s] on any device, are the latest of a step's sequences."""
        self._tokens.index_copy_(0, self._of_slots(step), tokens.to(self._tokens.device, non_blocking=True))

    def _of_slots(self, step: Step) -> torch.Tensor:
        places, slots = self._places[: step.num_sequences], step.slots.long()
        return places.copy_(slots.pin_memory() if places.is_cuda else slots, non_blocking=True)
