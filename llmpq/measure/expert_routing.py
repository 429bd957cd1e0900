"""Which shares of a text's tokens go through each expert of a mixture, and random routers that choose alike.

Trained routers like some experts far better than others. So a step touches fewer of them than if all were alike, reads
fewer weights, and has more rows for each: with tokens that choose independently of each other, m of them touch
sum(1 - (1 - share)^m) experts. What a step of a mixture costs is measured with random weights, whose router is given
the shares of the model's own: those of its best liked expert, the next and so on, on average over its layers. (Each
number of rows is timed on few draws of experts, so that costs scatter by as much as these do.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from llmpq.cache import find_record, keep_record
from llmpq.checkpoint.model_files import Checkpoint, load_tokenizer
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.text import calibration_text, digest
from llmpq.models import mixture
from llmpq.progress import Notify, counted, silent
from llmpq.spec import Experts, ModelSpec, Record, UsageError
from llmpq.spec.ranges import Share

SEQUENCES, SEQUENCE_LENGTH = 4, 256  # of calibration text
_SAMPLES, _ROUNDS = 2048, 40  # tokens by which a router's bias is fitted, and how often
_LEAST = 1e-3  # share that a fit tells from none


@dataclass(frozen=True, slots=True)
class ExpertShares(Record):
    """Of each layer's tokens, the share that goes through each expert; none of layers without experts."""

    SCHEMA = "llmpq.experts/1"

    layers: tuple[tuple[Share, ...], ...] = ()

    def of(self, spec: ModelSpec, experts: Experts) -> tuple[float, ...]:
        """The shares of the best liked expert, the next and so on, on average over the layers with these experts."""
        alike = [
            sorted(shares, reverse=True)
            for i, shares in enumerate(self.layers)
            if shares and spec.layer_kind(i).experts == experts
        ]
        return tuple(map(fmean, zip(*alike, strict=True)))


ALIKE = ExpertShares()  # nothing is known: routers choose all experts alike


def measured_shares(checkpoint: Checkpoint, spec: ModelSpec, notify: Notify = silent) -> ExpertShares:
    """Those of a model on calibration_text(), from the cache if they were measured before.

    ALIKE for models without experts, without a tokenizer, or of dummy weights, whose routers were never trained.
    """
    if checkpoint.format == "dummy" or all(kind.experts is None for kind in spec.layer_kinds):
        return ALIKE
    text = calibration_text()
    key = hashlib.sha256(json.dumps([spec.content_hash, digest(text), _version()]).encode()).hexdigest()[:24]
    found = find_record("experts", key, ExpertShares)
    if found is None:
        try:
            token_ids = load_tokenizer(checkpoint).encode(text)
        except UsageError:
            return ALIKE
        found = expert_shares(open_weights(checkpoint, spec), spec, token_ids, notify)
        keep_record("experts", key, found)
    return found


def _version() -> str:
    """Changes with the files that say which experts a token goes through."""
    sources = (*sorted(Path(__file__).parent.glob("*.py")), Path(mixture.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@torch.inference_mode()
def expert_shares(
    source: WeightSource, spec: ModelSpec, token_ids: Sequence[int], notify: Notify = silent
) -> ExpertShares:
    """Of a text of `token_ids`, by a pass through the model that holds a layer at a time. Raises UsageError."""
    text = CalibrationPass(spec, source, token_ids, SEQUENCES, SEQUENCE_LENGTH)
    done = counted(notify, "counting the tokens of each expert", spec.num_layers)
    hidden_states = text.embed()
    layers: list[tuple[float, ...]] = []
    for i in range(spec.num_layers):
        layer, experts = text.layer(i), spec.layer_kind(i).experts
        chosen: list[torch.Tensor] = []
        if experts is not None:
            layer.linear("up").register_forward_pre_hook(partial(_note_experts, chosen))
        hidden_states = text.run(layer, hidden_states)
        tokens = torch.cat(chosen).flatten().bincount(minlength=experts.count).tolist() if experts is not None else ()
        layers.append(tuple(count / text.tokens for count in tokens))
        done()
    return ExpertShares(tuple(layers))


def _note_experts(chosen: list[torch.Tensor], module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    """Of a call with x [t, k] and the experts [t, K] of its tokens."""
    chosen.append(arguments[1].clone())


def router_bias(shares: Sequence[float], per_token: int) -> torch.Tensor:
    """float32 [experts]: added to logits that are normally distributed, they choose each expert for its share.

    Fitted on a sample of tokens, for the `per_token` largest logits of each.
    """
    wanted = torch.tensor(shares).clamp(_LEAST, 1 - _LEAST).logit()
    logits = torch.randn(_SAMPLES, len(shares), generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(len(shares))
    for _ in range(_ROUNDS):
        chosen = (logits + bias).topk(per_token).indices
        found = chosen.flatten().bincount(minlength=len(shares)) / _SAMPLES
        bias += (wanted - found.clamp(_LEAST, 1 - _LEAST).logit()) / 2
    return bias
