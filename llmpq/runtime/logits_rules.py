"""What sampling parameters do to one row of logits.

Each rule is what transformers' logits processor of its name does; presence and frequency penalties, which it has not,
are OpenAI's, of the answer's tokens alone. Rows are float64: a rule is exact, whatever the model computes in.
Biases and penalties, however large, leave finite numbers. SamplingParams.check_tokens refuses what could forbid all.
A grammar is the last rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from llmpq.runtime.answer_grammar import AnswerGrammar
from llmpq.runtime.grammar import Ending
from llmpq.runtime.sampling import SamplingParams

_LARGEST = torch.finfo(torch.float64).max


class LogitsRules:
    """The rules of one request, with its tokens so far."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], ending: Iterable[int], grammar: AnswerGrammar | None = None
    ) -> None:
        """`prompt` may be empty unless the parameters read it. `ending`: the tokens that would end the answer.

        Of the latter, a model may name some that its table does not have. `grammar` is that of the parameters.
        """
        self._params, self._grammar = params, grammar
        self._tokens, self._num_output = [*prompt], 0
        self._seen, self._counts = set(prompt), Counter[int]()
        self._ending = torch.tensor(sorted(ending), dtype=torch.int64)
        self._biased = torch.tensor([*params.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([*params.logit_bias.values()], dtype=torch.float64)

    def add(self, token: int) -> None:
        """The answer's next token."""
        self._tokens.append(token)
        self._num_output += 1
        self._seen.add(token)
        self._counts[token] += 1
        if self._grammar is not None and not (self._ending == token).any():
            self._grammar.add(token)

    @property
    def ended(self) -> Ending | None:
        """How the answer has ended, if its grammar lets nothing follow."""
        return None if self._grammar is None else self._grammar.ended

    def apply(self, logits: torch.Tensor) -> None:
        """Change logits, float64 [vocab_size] on the CPU, in place; -inf is what cannot come."""
        logits[self._biased] += self._bias
        params = self._params
        if params.repetition_penalty != 1:
            _repetition(logits, self._seen, params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            tokens, counts = torch.tensor([*self._counts.items()], dtype=torch.int64).view(-1, 2).unbind(1)
            logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts.double()
        logits.clamp_(-_LARGEST, _LARGEST)
        for *before, last in params.bad_words_ids:
            if not before or self._tokens[-len(before) :] == before:
                logits[last] = -torch.inf
        if self._num_output < params.min_tokens:
            known = (self._ending >= 0) & (self._ending < len(logits))
            logits[self._ending[known]] = -torch.inf
        if self._grammar is not None:
            allowed = self._grammar.allowed(len(logits), self._ending.tolist())
            logits[~allowed] = -torch.inf
            if logits.max() == -torch.inf:  # its next token, whichever it is, ends the answer
                logits.zero_()


def _repetition(logits: torch.Tensor, seen: Iterable[int], penalty: float) -> None:
    """Make tokens that were seen less likely, or with a penalty below 1 likelier."""
    tokens = torch.tensor([*seen], dtype=torch.int64)
    found = logits[tokens]
    logits[tokens] = torch.where(found < 0, found * penalty, found / penalty)


def weights(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the tokens that may be chosen weigh, float64, and which they are, int64, rising; None: all.

    `logits` are [vocab_size] float32 or float64 on the CPU. Weights are in proportion to probabilities, 0 where a token
    must not be chosen. Of tokens that are equally likely, top_k and top_p take the first.
    """
    tokens = None
    if params.top_k or params.top_p < 1:
        logits, tokens = _likeliest(logits, params.top_k or len(logits))
    # In float64 temperatures near 0 stay finite: the largest logit becomes 0.
    logits = logits.double()
    found = ((logits - logits.max()) / params.temperature).exp_()
    if params.top_p < 1:
        cumulative = found.cumsum(0)
        # A token is kept if those before it have not reached top_p.
        found = found[: int(torch.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1]
    if params.min_p > 0:
        found[found < params.min_p * found.max()] = 0
    if params.typical_p < 1:
        found[~_typical(found, params.typical_p)] = 0
    if tokens is None:
        return found, None
    tokens, order = tokens[: len(found)].sort()
    return found[order], tokens


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits, the largest first and of equal ones the first, and whose they are."""
    tokens = torch.arange(len(logits), device="cpu")
    if count < len(logits):
        tokens = tokens[logits >= logits.topk(count).values[-1]]  # perhaps some too many, which are equal
    logits, order = logits[tokens].sort(descending=True, stable=True)
    return logits[:count], tokens[order[:count]]


def _typical(found: torch.Tensor, mass: float) -> torch.Tensor:
    """Which of these weights are among the fewest with this share whose surprise is nearest to the expected one."""
    shares = found / found.sum()
    surprise = -shares.log()
    distance = (surprise - torch.special.entr(shares).sum()).abs()
    ordered, order = distance.sort()
    last = min(int((shares[order].cumsum(0) < mass).sum()), len(order) - 1)
    kept: torch.Tensor = distance <= ordered[last]
    return kept
