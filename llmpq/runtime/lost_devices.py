"""Which devices were lost, and when each is tried again. Nothing here waits: the caller tells the time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

RETRY_S = 60.0  # from a loss until the device is tried again; doubled with its every further loss, and try in vain


class LostDevices:
    """Devices by name, and moments of one clock, in seconds.

    A device that comes back and is lost again, before it has run for as long as it was kept away at first for its last
    loss, is gone for good. So it comes back no more often than its running time doubles.
    """

    def __init__(self) -> None:
        self.gone: set[str] = set()  # for good
        self._losses, self._tries = Counter[str](), Counter[str]()  # the latter in vain, since the last loss
        self._due_s: dict[str, float] = {}  # of those that may come back
        self._back_s: dict[str, float] = {}  # since when others run again; inf: they are being loaded

    def lose(self, device: str, now_s: float) -> None:
        """It is lost."""
        back_s = self._back_s.pop(device, None)
        if back_s is not None and now_s - back_s < self._pause_s(device):
            self.gone.add(device)
            return
        self._losses[device] += 1
        self._due_s[device] = now_s + self._pause_s(device)

    def fail(self, device: str, now_s: float) -> None:
        """It was tried in vain."""
        self._tries[device] += 1
        self._due_s[device] = now_s + self._pause_s(device)

    def bring_back(self, devices: Collection[str]) -> None:
        """They are being loaded again, until `loaded`."""
        for device in devices:
            del self._due_s[device], self._tries[device]
            self._back_s[device] = math.inf

    def loaded(self, now_s: float) -> None:
        """All devices that are not out run."""
        self._back_s = {device: min(back_s, now_s) for device, back_s in self._back_s.items()}

    @property
    def out(self) -> list[str]:
        """Those that may come back."""
        return list(self._due_s)

    @property
    def next_s(self) -> float:
        """When the next is due; inf if none is out."""
        return min(self._due_s.values(), default=math.inf)

    def due(self, now_s: float) -> list[str]:
        """Those to be tried again."""
        return [device for device, due_s in self._due_s.items() if due_s <= now_s]

    def _pause_s(self, device: str) -> float:
        return RETRY_S * 2.0 ** (self._losses[device] - 1 + self._tries[device])
