"""What is known about a plan, and about a run of it: predictions, how good the plan is, outputs, the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmpq.spec.cluster import Cluster
from llmpq.spec.demand import Attained
from llmpq.spec.plan import Plan
from llmpq.spec.ranges import Duration, Index, Rate, Seconds, Total
from llmpq.spec.record import Record


@dataclass(frozen=True, slots=True)
class Prediction(Record):
    """What the planner expects of a plan, and what a run measures: seconds of both phases, throughput, peak memory."""

    prefill_s: Duration
    decode_s: Duration
    tokens_per_s: Rate  # generated tokens over both phases
    memory_bytes: tuple[Total, ...]  # of each stage, above the idle worker


@dataclass(frozen=True, slots=True)
class Solution(Record):
    """How good the plan is known to be. `objective` and `bound` are in the unit of what was minimised.

    That is seconds of a batch, plus theta * omega; or where cost is the objective, what the devices in use cost in that
    time, for a million generated tokens, in the currency of their prices. For a demand, it is seconds for a request.
    """

    solver: str
    objective: float
    bound: float  # no plan in the searched space is better than this
    seconds: Seconds  # spent solving
    omega: float
    omega_budget: float | None

    @property
    def gap(self) -> float:
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Quality(Record):
    """What a plan that was made for a quality budget loses against the model in 16 bits.

    In perplexity as relative increases, 0.01 for 1 %; in KL as mean divergences in nats.
    """

    metric: Literal["perplexity", "kl"]
    limit: float  # what was allowed
    predicted: float  # from the summed sensitivity
    validation: float  # measured on the text by which the plan was chosen
    test: float  # measured once, on text that nothing was chosen by
    test_error: float  # standard error of that
    tokens: int  # of each text
    rounds: int  # of solving and measuring


@dataclass(frozen=True, slots=True)
class Solved(Record):
    """What the planner returns and `llmpq plan` writes: a plan, what it is expected to take, how good it is."""

    SCHEMA = "llmpq.solved/1"

    plan: Plan
    prediction: Prediction
    solution: Solution
    quality: Quality | None = None  # if it was made for a quality budget
    online: Attained | None = None  # if it was made for a demand

    @property
    def cost_per_million_tokens(self) -> float | None:
        """Predicted price of a million generated tokens, by the devices in use; None if one has no price."""
        prices = [self.plan.cluster.device(stage.device).price_per_hour for stage in self.plan.stages]
        if self.prediction.tokens_per_s == 0 or min(prices) == 0:
            return None
        return sum(prices) / 3600 * 1e6 / self.prediction.tokens_per_s


@dataclass(frozen=True, slots=True)
class LogProb(Record):
    """What the model thought of a token, and which others it thought likeliest. Natural logarithms."""

    log_prob: float  # before any rule or temperature
    top_ids: tuple[int, ...] = ()  # as many as asked for, the likeliest first
    top_log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Output(Record):
    """What became of a prompt; with `n` there are several of one."""

    prompt: str  # of a conversation, its last message
    text: str
    token_ids: tuple[int, ...]
    finish_reason: (
        str  # "stop": a token or text that ends it; "length": the token limit; "cancelled"; "error": see there
    )
    index: int = 0  # of the prompt, from 0, in the order they were given
    custom_id: str | None = None  # that its line of a batch file has
    seed: int | None = None  # that it was sampled with; None if it is greedy
    error: str | None = None  # why it has no answer
    choice: int = 0  # of the n answers to the prompt; with best_of the likeliest first
    log_probs: tuple[LogProb, ...] | None = None  # of each token, if that was asked for
    prompt_log_probs: tuple[LogProb, ...] | None = None  # of the prompt's tokens but the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover(Record):
    """What it took to go on with another plan while requests ran."""

    planning_s: Duration
    loading_s: Duration
    requests: Index  # that were in flight
    tokens: Total  # of their prompts and answers, which were computed again
    changed: tuple[str, ...] = ()  # units that are stored or multiplied in another way since; texts may differ
    kept: Total = 0  # units that stayed in the memory of their device
    loaded: Total = 0  # the others; of neither there are any if another device was lost before all were loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoss(Takeover):
    """A device that was lost while requests ran, and what it took to go on."""

    device: str
    reason: str  # the line that a run ends with which does not go on
    restarted: tuple[str, ...] = ()  # lost devices that the next plan has again, as nothing fits without them


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReturn(Takeover):
    """Devices that were lost, and were taken back while requests ran, and what that took."""

    devices: tuple[str, ...]
    out_s: Duration  # since the first of them was lost, when the plan with them was there


@dataclass(frozen=True, slots=True)
class Report(Record):
    """What a run writes: the plan, what it predicted, what was measured, what was said."""

    SCHEMA = "llmpq.report/1"

    model: str
    cluster: Cluster
    plan: Plan
    predicted: Prediction | None  # None if the costs that were given do not reach it
    measured: Prediction
    outputs: tuple[Output, ...]
    quality: Quality | None = None  # if the plan was made for a quality budget
    losses: tuple[DeviceLoss, ...] = ()  # after each, another plan was made; `plan` and `measured` are of the last one
    returns: tuple[DeviceReturn, ...] = ()  # as after each of these
