"""The Fisher information of a model's predictions along the change that quantizing a unit makes.

To second order, the divergence of the predictions p from those of the changed model is 1/2 E[(g . d)^2]: d is the
change, g the gradient of the loss -log p(y) with labels y drawn from p itself. (Drawn from the text instead, they give
no divergence, since the text is not what the model expects.) Taken over weights, that takes a gradient for each token,
of the size of the model, of which others keep the squares only, as if weights did not depend on each other. Here d is
the change of a unit's output, which holds the same information and is small:

    omega = 1/2 * E_t[(g_t . d_t)^2]

with d_t = what the quantized unit puts out at token t for the model's own hidden states, less what the unit does, and
g_t = the gradient of the summed loss of all tokens, which depends on this output by attention as well. All within the
unit is exact: interactions of its linears and all orders of the change. What is left out: changes at two tokens that
add up in the predictions of a third. For the head, the mean over labels is worked out: 1/2 * E_t[variance of the change
of the logits under p].

The gradient takes one backward pass: hidden states are kept from a pass forward, and each layer is computed again when
it is its turn. Then a pass forward compares each unit with its quantized selves. Held are a layer with the activations
of the text, and as many hidden states as there are layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.checkpoint.weights import WeightSource, dense, floating
from llmpq.kernels import PreparedWeight
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.differentiable_layer import DifferentiableLayer, norm
from llmpq.measure.served_units import ServedUnits
from llmpq.progress import Notify, OnStep, counted, silent
from llmpq.spec import ModelSpec, Precision

SEQUENCES, SEQUENCE_LENGTH = 4, 256  # of calibration text
_ROWS = 64  # tokens whose logits are held at a time
_SEED = 0  # of the labels


def fisher(
    source: WeightSource,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    token_ids: Sequence[int],
    notify: Notify = silent,
    *,
    per_linear: bool = False,
) -> dict[str, dict[str, float]]:
    """omega[unit][precision] by the formula above. With `per_linear` also omega["layer.0.qkv"][precision]: a linear's
    share of its layer's omega, in proportion to what each linear loses alone.
    """
    text = CalibrationPass(spec, source, token_ids, SEQUENCES, SEQUENCE_LENGTH)
    units = ServedUnits(spec, source, token_ids)
    done = counted(notify, "measuring the information that each layer carries", 3 * spec.num_layers + 2)
    gradients = output_gradients(source, spec, text, done)
    exact = text.embed()

    def omega(unit: int, changed: torch.Tensor) -> float:
        return (gradients[unit] * (changed - exact)).sum(-1).double().square().mean().item() / 2

    found = {"embedding": {str(p): omega(0, text.embed(units.table("embedding", p))) for p in precisions}}
    for i in range(spec.num_layers):
        layer, before = text.layer(i), exact
        exact = text.run(layer, before)
        for p in precisions:
            quantized, alone = text.layer(i, p, units), {}
            whole = found.setdefault(f"layer.{i}", {})[str(p)] = omega(i + 1, text.run(quantized, before))
            for name in spec.linears(f"layer.{i}") if per_linear else ():
                linear = layer.linear(name)
                layer.set_linear(name, quantized.linear(name))
                alone[name] = omega(i + 1, text.run(layer, before))
                layer.set_linear(name, linear)
            for name, value in alone.items():
                found.setdefault(f"layer.{i}.{name}", {})[str(p)] = whole * value / (sum(alone.values()) or 1.0)
        done()
    found["head"] = {str(p): _head(text, exact, units.table("head", p)) for p in precisions}
    done()
    return found


def output_gradients(source: WeightSource, spec: ModelSpec, text: CalibrationPass, done: OnStep) -> list[torch.Tensor]:
    """Gradients [t, hidden_size] of the loss, summed over all tokens, by what the embedding and each layer put out.

    `done` is called for each layer forward, the head, and each layer backward.
    """
    hidden_states = [text.embed()]
    for i in range(spec.num_layers):
        hidden_states.append(text.run(text.layer(i), hidden_states[-1]))
        done()
    # One list, in which gradients take the place of hidden states, last first.
    hidden_states[-1] = gradient = _head_gradient(source, spec, text, hidden_states[-1])
    done()
    for i in reversed(range(spec.num_layers)):
        x = hidden_states[i].clone().unflatten(0, (text.sequences, text.length)).requires_grad_()
        DifferentiableLayer(spec, source, i)(x, text.rotary).backward(gradient.view_as(x))
        assert x.grad is not None
        hidden_states[i] = gradient = x.grad.flatten(0, 1)
        done()
    return hidden_states


def _head_gradient(
    source: WeightSource, spec: ModelSpec, text: CalibrationPass, hidden_states: torch.Tensor
) -> torch.Tensor:
    """Gradient [t, hidden_size] of each token's loss, by its hidden state; the table is read in portions."""
    head, generator = text.head(), torch.Generator().manual_seed(_SEED)
    unit, gradients = "embedding" if spec.tied_embeddings else "head", []
    for rows in hidden_states.split(_ROWS):
        logits = head(rows, torch.empty(len(rows), spec.vocab_size))
        slope = logits.softmax(-1)
        slope[torch.arange(len(rows)), draw(slope, generator)] -= 1  # of the loss by the logits
        if head.cap is not None:
            slope *= 1 - (logits / head.cap).square()
        by_x, at = torch.zeros(len(rows), spec.embedding_dim), 0
        for portion in map(floating, source.rows(unit, "table.weight")):
            by_x += slope[:, at : at + len(portion)] @ portion.float()
            at += len(portion)
        if head.project is not None:
            by_x = by_x @ dense(source, "head", "project.weight")
        if head.norm is None:
            gradients.append(by_x)
            continue
        x = rows.clone().requires_grad_()
        norm(x, head.norm.weight, head.norm.bias, head.norm.eps).backward(by_x)
        assert x.grad is not None
        gradients.append(x.grad)
    return torch.cat(gradients)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A label for each row of probabilities [t, vocab_size]: int64 [t]."""
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _head(text: CalibrationPass, hidden_states: torch.Tensor, table: PreparedWeight) -> float:
    """Half the variance of the logits' change under the model's own distribution, on average over tokens."""
    exact, quantized, total = text.head(), text.head(table), 0.0
    for rows in hidden_states.split(_ROWS):
        shape = (len(rows), exact.table.weight.n)
        logits = exact(rows, torch.empty(shape))
        change, probabilities = quantized(rows, torch.empty(shape)) - logits, logits.softmax(-1)
        change -= (probabilities * change).sum(-1, keepdim=True)
        total += float((probabilities * change.square()).double().sum())
    return total / len(hidden_states) / 2
