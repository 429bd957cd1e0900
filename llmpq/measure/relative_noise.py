"""From the noise that quantizing adds to each linear's output to the nats that each unit loses: a sum in proportion.

The paper (arXiv 2403.01136, section 4) adds up the variances of this noise as they are (`added`), over the linears of a
layer. They are not alike, though: inputs and outputs of a few layers are a thousand times larger than those of the
others, which take the whole quality budget without being more sensitive. So here (`propagated`) the noise is taken
relative to the residual stream that it disturbs, and expressed by its effect on a prediction: the Kullback-Leibler
divergence, in nats, of next-token distributions whose logits differ by noise of variance v is about v / 2. With nu_t,
the noise that token t finds in an output element, its square on average over the outputs:

    head    E_t[nu_t] / 2
    others  L / 2 * E_t[ mean over the streams read from this unit on, of  noise_t / (mean square of the stream) ]

Noise that a layer writes into the stream: (rho_qkv + rho_out) * a_t + (f * rho_up + rho_down) * d_t, where rho = nu /
(mean square of the output) is the relative noise of a linear, a and d are the mean squares of what attention and MLP
add, and f is 2 where up is gated (noise in both factors), else 1. Streams read from unit u on: the output of u and of
every later layer, each read by the next unit. L is the variance of a token's logits over the vocabulary, the noise of a
final hidden state that is disturbed by its own size. Of a mixture of experts, what each expert of a token writes counts
with the square of its weight. (Where norms come after, as in OPT-350m, their change of scale
within a layer is left out.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from llmpq.checkpoint.weights import WeightSource, floating
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.expert_inputs import Shares, note_shares
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.models.step import Step
from llmpq.progress import Notify, counted, silent
from llmpq.spec import W16, ModelSpec

SEQUENCES, SEQUENCE_LENGTH = 4, 256  # of calibration text


class Noise(Protocol):
    """nu of each linear at several precisions [p] at once, float64. Linears come in the order of the model."""

    @property
    def source(self) -> WeightSource:
        """To read the weights from, each before its noise is asked for."""

    def embedded(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """[p, t] in what is embedded, `hidden_states` [t, hidden_size]."""

    def linear(self, unit: str, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[p, t] in the output y [t, n] of a fused linear of a layer for inputs x [t, k]."""

    def experts(self, unit: str, name: str, x: torch.Tensor, experts: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[p, t * K] in the outputs y [t * K, n] of the experts [t, K] that tokens go through, for x as they get it."""

    def head(self, x: torch.Tensor, table: QuantLinear) -> torch.Tensor:
        """[p] in the logits of x [t, embedding_dim], on average over t."""


@torch.inference_mode()
def propagated(
    noise: Noise, spec: ModelSpec, token_ids: Sequence[int], notify: Notify = silent
) -> dict[str, list[float]]:
    """omega of each unit at each of the noise's precisions."""
    text = CalibrationPass(spec, noise.source, token_ids, SEQUENCES, SEQUENCE_LENGTH)
    unit_done = counted(notify, "measuring the sensitivity of each layer to quantization", len(spec.units))
    hidden_states = text.embed()
    noises, streams = [noise.embedded(text.step, hidden_states)], [hidden_states.square().mean(-1)]
    unit_done()
    for i in range(spec.num_layers):
        hidden_states, nu, size, shares = _layer(noise, spec, text, i, hidden_states)
        noises.append(_written(spec, nu, size, shares))
        streams.append(hidden_states.square().mean(-1))
        unit_done()
    x, table = text.before_table(hidden_states), QuantLinear(text.loader.table("head", W16))
    logit_variance = x.double().square().mean(0) @ _variance_of_columns(noise.source, spec)
    inverse = torch.stack(streams).double().reciprocal()  # [units but the head, tokens]
    disturbances = [(part[:, None] * inverse[i:]).mean((1, 2)) for i, part in enumerate(noises)]
    omega = [*(logit_variance / 2 * value for value in disturbances), noise.head(x, table) / 2]
    unit_done()
    return {unit: values.tolist() for unit, values in zip(spec.units, omega, strict=True)}


@torch.inference_mode()
def added(noise: Noise, spec: ModelSpec, token_ids: Sequence[int], notify: Notify = silent) -> dict[str, list[float]]:
    """nu of each unit at each of the noise's precisions, on average over tokens, summed over the unit's linears."""
    text = CalibrationPass(spec, noise.source, token_ids, SEQUENCES, SEQUENCE_LENGTH)
    unit_done = counted(notify, "measuring the noise that quantizing each layer adds", len(spec.units))
    hidden_states, found = text.embed(), {}
    found["embedding"] = noise.embedded(text.step, hidden_states).mean(1)
    unit_done()
    for i in range(spec.num_layers):
        hidden_states, nu, *_ = _layer(noise, spec, text, i, hidden_states)
        found[f"layer.{i}"] = torch.stack([values.mean(1) for values in nu.values()]).sum(0)
        unit_done()
    x, table = text.before_table(hidden_states), QuantLinear(text.loader.table("head", W16))
    found["head"] = noise.head(x, table)
    unit_done()
    return {unit: values.tolist() for unit, values in found.items()}


ByLinear = dict[str, torch.Tensor]  # of a layer


def _layer(
    noise: Noise, spec: ModelSpec, text: CalibrationPass, i: int, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, ByLinear, ByLinear, Shares]:
    """Hidden states after layer i, the noise [p, t] in its linears' outputs, and the mean squares [t] of these.

    Of linears of experts there are K for each token. The last is by what the outputs of its MLPs are multiplied.
    """
    layer = text.layer(i)
    nu: ByLinear = {}
    size: ByLinear = {}
    shares: Shares = {"": torch.ones(text.tokens, 1)}

    def observe(name: str, module: QuantLinear, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, residual = arguments[0], arguments[2] if len(arguments) == 3 else None
        y = output if residual is None else output - residual
        nu[name] = noise.linear(f"layer.{i}", name, x, y)
        size[name] = y.double().square().mean(-1)

    def observe_experts(
        name: str, module: ExpertLinear, arguments: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        x, experts, _ = arguments
        nu[name] = noise.experts(f"layer.{i}", name, x, experts, output)
        size[name] = output.double().square().mean(-1)

    for name, shape in spec.linears(f"layer.{i}").items():
        hook = observe_experts if shape.experts > 1 else observe
        layer.linear(name).register_forward_hook(partial(hook, name))
    note_shares(layer, shares)
    return text.run(layer, hidden_states), nu, size, shares


def _written(spec: ModelSpec, nu: ByLinear, size: ByLinear, shares: Shares) -> torch.Tensor:
    """The noise [p, t] that a layer writes into the stream, by the formula above."""
    rho = {name: nu[name] / size[name].clamp_min(1e-30) for name in nu}
    factor, written = 2 if spec.gated_mlp else 1, (rho["qkv"] + rho["out"]) * size["out"]
    for prefix, share in shares.items():
        up, down = f"{prefix}up", f"{prefix}down"
        noise = (factor * rho[up] + rho[down]) * size[down]
        written = written + (noise.unflatten(-1, share.shape) * share.double().square()).sum(-1)
    return written


def _variance_of_columns(source: WeightSource, spec: ModelSpec) -> torch.Tensor:
    """float64 [embedding_dim]: over the rows of the head's table."""
    unit, moments = "embedding" if spec.tied_embeddings else "head", torch.zeros(2, spec.embedding_dim).double()
    for rows in map(floating, source.rows(unit, "table.weight")):
        moments += torch.stack([rows.float().sum(0), rows.float().square().sum(0)])
    mean, mean_square = moments.div_(spec.vocab_size).unbind()
    return mean_square - mean.square()
