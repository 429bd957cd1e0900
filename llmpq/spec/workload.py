"""Workload: what a plan is made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

from llmpq.spec.layers import blocks_for
from llmpq.spec.ranges import Count, Index, Sequences
from llmpq.spec.record import Record, check


@dataclass(frozen=True, slots=True)
class Workload(Record):
    """`batch_size` sequences of `prompt_len` tokens (the mean), each continued by `output_len` tokens.

    `max_prompt_len` is the longest prompt; memory is planned for it. Where lengths differ and are known, they are those
    of a sample, `prompt_lens` and `output_lens`, in the order the sequences come: consecutive ones make a batch, as
    often as need be. `prompt_len` is then their mean, rounded; `output_len` and `max_prompt_len` are the longest.
    """

    batch_size: Sequences
    prompt_len: Count
    output_len: Count
    max_prompt_len: Index = 0  # 0: as prompt_len
    prompt_lens: tuple[Count, ...] = ()
    output_lens: tuple[Count, ...] = ()

    def validate(self) -> None:
        check(
            self.max_prompt_len == 0 or self.max_prompt_len >= self.prompt_len,
            "max_prompt_len",
            f"is {self.max_prompt_len}, less than prompt_len = {self.prompt_len}",
        )
        prompts, outputs = self.prompt_lens, self.output_lens
        count = len(prompts)
        check(len(outputs) == count, "output_lens", f"has {len(outputs)} entries for {count} prompts")
        if not count:
            return
        for field, expected, what in (
            ("prompt_len", _mean(prompts), "mean"),
            ("output_len", max(outputs), "longest"),
            ("max_prompt_len", max(prompts), "longest"),
        ):
            value = getattr(self, field)
            check(value == expected, field, f"is {value}, but the {what} of the sequences is {expected}")

    @classmethod
    def of_lengths(cls, batch_size: int, lengths: Iterable[tuple[int, int]]) -> Workload:
        """For sequences of these lengths (prompt, output), of which batches of at most `batch_size` are made."""
        prompts, outputs = zip(*lengths, strict=True)
        mean, longest, output_len = _mean(prompts), max(prompts), max(outputs)
        if min(prompts) == longest and min(outputs) == output_len:
            return cls(batch_size, mean, output_len)
        return cls(batch_size, mean, output_len, longest, prompts, outputs)

    @property
    def longest_prompt(self) -> int:
        return self.max_prompt_len or self.prompt_len

    @property
    def max_length(self) -> int:
        """Tokens a cache slot must hold."""
        if self.prompt_lens:
            return max(map(sum, self._sequences))
        return self.longest_prompt + self.output_len

    @property
    def _sequences(self) -> list[tuple[int, int]]:
        return list(zip(self.prompt_lens, self.output_lens, strict=True)) or [(self.prompt_len, self.output_len)]

    @property
    def batches(self) -> list[list[tuple[int, int]]]:
        """The lengths (prompt, output) of the sequences of each batch; the sample starts anew to fill the last one."""
        sequences = self._sequences
        count = -(-len(sequences) // self.batch_size)
        endless = cycle(sequences)
        return [list(islice(endless, self.batch_size)) for _ in range(count)]

    @property
    def output_tokens(self) -> float:
        """Tokens that a batch generates, on average."""
        if not self.prompt_lens:
            return self.batch_size * self.output_len
        batches = self.batches
        return sum(output for batch in batches for _, output in batch) / len(batches)

    @property
    def rounds(self) -> float:
        """Decode rounds of a batch, on average: the first token of each sequence comes from its prompt."""
        if not self.prompt_lens:
            return self.output_len - 1
        batches = self.batches
        return sum(max(output for _, output in batch) - 1 for batch in batches) / len(batches)

    @property
    def cache_blocks(self) -> int:
        """Blocks of the KV cache for a batch at once: for any `batch_size` sequences in a row, at their full lengths.

        Where the lengths of single sequences are not known, all may have the longest.
        """
        size = self.batch_size
        if not self.prompt_lens:
            return size * blocks_for(self.max_length)
        needed = [blocks_for(prompt + output) for prompt, output in self._sequences]
        endless = islice(cycle(needed), len(needed) + size - 1)
        ends = list(accumulate(endless, initial=0))
        return max(max(end - start for start, end in zip(ends, ends[size:])), max(needed))

    @property
    def recomputes(self) -> bool:
        """Whether blocks may run out: who gives its own back is computed anew, its answer so far with the prompt."""
        return self.cache_blocks < self.batch_size * blocks_for(self.max_length)

    def prefill_tokens(self, microbatch: int) -> int:
        """The most tokens that so many prompts in a row have."""
        if not self.prompt_lens:
            return microbatch * self.longest_prompt
        batches = ([prompt for prompt, _ in batch] for batch in self.batches)
        return max(sum(batch[i : i + microbatch]) for batch in batches for i in range(0, len(batch), microbatch))

    def largest_prefill(self, microbatch: int) -> int:
        """The most tokens that a step of prefill of so many sequences may have; what memory is for."""
        tokens = self.prefill_tokens(microbatch)
        return max(tokens, self.max_length) if self.recomputes else tokens

    def with_lengths(self, change: Callable[[int], int]) -> Workload:
        """The same number of sequences, each length changed."""
        if self.prompt_lens:
            return Workload.of_lengths(self.batch_size, [(change(p), change(o)) for p, o in self._sequences])
        longest = change(self.max_prompt_len) if self.max_prompt_len else 0
        return Workload(self.batch_size, change(self.prompt_len), change(self.output_len), longest)


def _mean(lengths: Sequence[int]) -> int:
    return round(sum(lengths) / len(lengths))
