"""What quantizing one unit changes in the predictions, measured: no theory, and no noise but the text's.

omega = E_t[ KL(p_t || q_t) ] in nats, p_t being the model's distribution of the token after t, and q_t that of the
model with this one unit quantized. All changed models go through the layers side by side: layer i is loaded once and
run on the hidden states that quantized units before it have changed, so a unit is quantized where its input stands
ready, and costs no more than the layers after it: half a pass through the model on average. Held are a unit, and hidden
states for every layer and precision so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.served_units import ServedUnits
from llmpq.models.ends import Head
from llmpq.progress import Notify, OnStep, counted, silent
from llmpq.spec import ModelSpec, Precision

SEQUENCES, SEQUENCE_LENGTH = 2, 256  # of calibration text
ROWS = 64  # tokens whose logits are held at a time

C = TypeVar("C")
Change = tuple[str, Precision]  # the unit that is quantized, and to what


class Damage(NamedTuple):
    """What a change does, in nats, on average over tokens."""

    kl: float
    loss: float  # what it adds to -log p(next token of the text)


def kl(
    source: WeightSource,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    token_ids: Sequence[int],
    notify: Notify = silent,
) -> dict[str, dict[str, float]]:
    """omega[unit][precision] by the definition above."""
    text = CalibrationPass(spec, source, token_ids, SEQUENCES, SEQUENCE_LENGTH)
    units = ServedUnits(spec, source, token_ids)
    found = single_damages(text, units, spec, precisions, notify)
    return {unit: {str(p): found[unit, p].kl for p in precisions} for unit in spec.units}


@torch.inference_mode()
def single_damages(
    text: CalibrationPass,
    units: ServedUnits,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    notify: Notify = silent,
) -> dict[Change, Damage]:
    """What each unit does alone in each precision."""
    layers = sum(1 + (i + 2) * len(precisions) for i in range(spec.num_layers))
    heads = -(-text.tokens // ROWS) * len(spec.units) * len(precisions)
    done = counted(notify, "measuring what quantizing each layer changes", layers + heads)
    exact = text.embed()
    changed: dict[Change, torch.Tensor] = {
        ("embedding", p): text.embed(units.table("embedding", p)) for p in precisions
    }
    for i in range(spec.num_layers):
        layer = text.layer(i)
        for change, hidden_states in changed.items():
            changed[change] = text.run(layer, hidden_states)
            done()
        for p in precisions:
            changed[f"layer.{i}", p] = text.run(text.layer(i, p, units), exact)
            done()
        exact = text.run(layer, exact)
        done()
    head = text.head()
    through = {change: (head, hidden_states) for change, hidden_states in changed.items()}
    found = damages(text, head, exact, through, done)
    for p in precisions:
        found |= damages(text, head, exact, {("head", p): (text.head(units.table("head", p)), exact)}, done)
    return found


def damages(
    text: CalibrationPass,
    head: Head,
    exact: torch.Tensor,
    changed: Mapping[C, tuple[Head, torch.Tensor]],
    done: OnStep,
) -> dict[C, Damage]:
    """Of each changed head or hidden states [t, hidden_size], beside `head` of `exact`."""
    divergences, losses = dict.fromkeys(changed, 0.0), dict.fromkeys(changed, 0.0)
    targets = text.step.tokens.roll(-1)[:, None]
    predicts = torch.arange(text.tokens) % text.length != text.length - 1  # the last one of a sequence has no next
    for start in range(0, text.tokens, ROWS):
        rows = slice(start, start + ROWS)
        reference = _log_probabilities(head, exact[rows])
        for change, (other, hidden_states) in changed.items():
            log_ratio = reference - _log_probabilities(other, hidden_states[rows])
            losses[change] += float(log_ratio.gather(1, targets[rows])[predicts[rows]].double().sum())
            # Sum of q - p is 0; with it, no term is negative, and an error in a row's normalisation cancels.
            terms = log_ratio + torch.expm1((-log_ratio).clamp_(max=80))
            divergences[change] += float((reference.exp() * terms).double().sum())
            done()
    count = max(1, int(predicts.sum()))
    return {change: Damage(divergences[change] / text.tokens, losses[change] / count) for change in changed}


def _log_probabilities(head: Head, hidden_states: torch.Tensor) -> torch.Tensor:
    logits = head(hidden_states, torch.empty(len(hidden_states), head.table.weight.n))
    return torch.log_softmax(logits, -1)
