"""Workload: what a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from llmpq.spec.record import Record, check


@dataclass(frozen=True, slots=True)
class Workload(Record):
    """`batch_size` sequences of `prompt_len` tokens (the mean), each continued by `output_len` tokens.

    `max_prompt_len` is the longest prompt; memory is planned for it.
    """

    batch_size: int
    prompt_len: int
    output_len: int
    max_prompt_len: int = 0  # 0: as prompt_len

    def __post_init__(self) -> None:
        for field in ("batch_size", "prompt_len", "output_len"):
            check(getattr(self, field) > 0, field, f"is {getattr(self, field)}, expected a positive number")
        check(
            self.max_prompt_len == 0 or self.max_prompt_len >= self.prompt_len,
            "max_prompt_len",
            f"is {self.max_prompt_len}, less than prompt_len = {self.prompt_len}",
        )

    @property
    def longest_prompt(self) -> int:
        return self.max_prompt_len or self.prompt_len

    @property
    def max_length(self) -> int:
        """Tokens a cache slot must hold."""
        return self.longest_prompt + self.output_len
