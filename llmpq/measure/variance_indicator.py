"""Sensitivity of each unit to quantization, from one forward pass of the model as it is.

The variance indicator of LLM-PQ (arXiv 2403.01136, section 4): quantizing a linear adds noise to its output whose
variance follows from the quantization steps and the inputs. With scales for groups of weights, the noise that token t
finds in an output element is, on average over the n outputs,

    nu_t = 1/n * sum over rows r and columns i of  S[r, g(i)]^2 / 12 * x[t, i]^2

where S is the step of the group that holds weight (r, i): its range over 2^bits - 1. A rounding error is uniform over
a step, hence 1/12 (the paper's 1/4 is the bound; a constant factor), and x^2 takes the place of the paper's Var[X],
since the error meets the mean of the input, too. Their code keeps one sample's statistics; here every token counts.

The paper adds these variances up as they are. They are not alike, though: inputs and outputs of a few layers are a
thousand times larger than those of the others, which would take the whole quality budget without being more sensitive.
So the noise is taken relative to the residual stream that it disturbs, and expressed by its effect on a prediction:
the Kullback-Leibler divergence, in nats, of next-token distributions whose logits differ by noise of variance v is
about v / 2.

    head    E_t[nu_t] / 2
    others  L / 2 * E_t[ mean over the streams read from this unit on, of  noise_t / (mean square of the stream) ]

Noise that a layer writes into the stream: (rho_qkv + rho_out) * a_t + (f * rho_up + rho_down) * d_t, where rho = nu /
(mean square of the output) is the relative noise of a linear, a and d are the mean squares of what attention and MLP
add, and f is 2 where up is gated (noise in both factors), else 1. The embedding's: its rows are copied, not multiplied
(the input is one-hot), so the noise of an element is its S^2 / 12 itself. Streams read from unit u on: the output of u
and of every later layer, each read by the next unit. L is the variance of a token's logits over the vocabulary, the
noise of a final hidden state that is disturbed by its own size. 16 bit adds no noise: 0. (Where norms come after, as
in OPT-350m, their change of scale within a layer is left out.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from llmpq.cache import find_record, keep_record
from llmpq.checkpoint.families import Part
from llmpq.checkpoint.model_files import Checkpoint, load_tokenizer
from llmpq.checkpoint.weights import WeightSource, floating, open_weights
from llmpq.measure.text import calibration_text, digest
from llmpq.models.arena import Arena
from llmpq.models.decoder import DecoderLayer, DecoderStage, build_embedding, build_norm
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import QuantLinear
from llmpq.models.loading import Loader
from llmpq.models.rotary import Rotary
from llmpq.models.step import Step
from llmpq.progress import Notify, counted, silent
from llmpq.spec import W16, ModelSpec, Precision, Sensitivity, UsageError

METHOD = "variance"
SEQUENCES, SEQUENCE_LENGTH = 4, 256  # of calibration text


def sensitivity(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    precisions: Sequence[Precision],
    text: str | None = None,
    notify: Notify = silent,
) -> Sensitivity:
    """omega of every unit at each of `precisions`, from the cache if it was measured before.

    `text` is what the model reads meanwhile, calibration_text() by default. Raises UsageError for
    a text of less than two tokens.
    """
    text = calibration_text() if text is None else text
    key = json.dumps([METHOD, spec.content_hash, digest(text), sorted({str(p) for p in precisions}), _version()])
    entry = hashlib.sha256(key.encode()).hexdigest()[:24]
    found = find_record("sensitivity", entry, Sensitivity)
    if found is not None:
        return found
    notify("reading the calibration text")
    token_ids = load_tokenizer(checkpoint).encode(text)
    omega = variance(open_weights(checkpoint, spec), spec, precisions, token_ids, notify)
    result = Sensitivity(spec.name, spec.content_hash, METHOD, digest(text), omega)
    keep_record("sensitivity", entry, result)
    return result


def _version() -> str:
    """Changes with this file, and so with the formula."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


class Noise:
    """A weight source that records the rounding noise each precision adds to the rows that are read from it.

    By matrix [n, k], for steps S of a group's whole range; `factor` turns S^2 into that of a number of bits.
    """

    def __init__(self, source: WeightSource, precision: Precision) -> None:
        self.cacheable = source.cacheable
        self._source, self._precision = source, precision
        self.columns: dict[Part, torch.Tensor] = {}  # [k], float64: S^2 / 12 summed over rows
        self.rows_noise: dict[Part, list[torch.Tensor]] = {}  # [n] in portions: the mean of S^2 / 12 over a row
        self.rows_square: dict[Part, list[torch.Tensor]] = {}  # [n] in portions: the mean square of a row
        self.moments: dict[Part, torch.Tensor] = {}  # [2, k], float64: sum and sum of squares over rows

    @staticmethod
    def factor(bits: int) -> float:
        """S^2 at `bits`, relative to a step of the whole range."""
        return 1.0 / float(2**bits - 1) ** 2

    def rows(self, unit: str, part: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        for portion in map(floating, self._source.rows(unit, part, start, stop)):
            if portion.dim() == 2:
                self._note((unit, part), portion.float())
            yield portion

    def _note(self, matrix: Part, rows: torch.Tensor) -> None:
        n, k = rows.shape
        group = self._precision.group_size or k
        padded = torch.nn.functional.pad(rows, (0, -k % group), value=0.0) if k % group else rows
        groups = padded.view(n, -1, group)
        if self._precision.zero == "sym":
            span = 2 * groups.abs().amax(-1)
        elif self._precision.zero == "offset":
            low, high = groups.aminmax(dim=-1)
            if k % group:  # what fills up the last group is no weight
                low[:, -1], high[:, -1] = rows[:, -(k % group) :].aminmax(dim=-1)
            span = high - low
        else:  # zero is representable, which keeps the zero point in range
            span = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
        variance = span.square() / 12
        columns = variance.double().sum(0).repeat_interleave(group)[:k]
        widths = torch.full((variance.shape[1],), float(group))
        widths[-1] = k - group * (len(widths) - 1)
        moments = torch.stack([rows.sum(0), rows.square().sum(0)]).double()
        self.columns[matrix] = self.columns.get(matrix, 0) + columns
        self.moments[matrix] = self.moments.get(matrix, 0) + moments
        self.rows_noise.setdefault(matrix, []).append(variance @ widths / k)
        self.rows_square.setdefault(matrix, []).append(rows.square().mean(-1))


def variance(
    source: WeightSource,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    token_ids: Sequence[int],
    notify: Notify = silent,
) -> dict[str, dict[str, float]]:
    """omega[unit][precision] by the formula above. Holds a unit at a time.

    `token_ids` are cut into equal sequences.
    """
    quantized = dict.fromkeys(p for p in precisions if p.quantized)
    omega: dict[str, dict[str, float]] = {unit: {} for unit in spec.units}
    for like in {(p.group_size, p.zero): p for p in quantized}.values():
        base = _ForwardPass(spec, Noise(source, like), token_ids).run(notify)
        for p in quantized:
            if (p.group_size, p.zero) == (like.group_size, like.zero):
                for unit in spec.units:
                    omega[unit][str(p)] = base[unit] * Noise.factor(p.bits)
    return omega


class _ForwardPass:
    """The model run once, unit by unit, in float32 with its own weights; each is read, used and dropped."""

    def __init__(self, spec: ModelSpec, noise: Noise, token_ids: Sequence[int]) -> None:
        if len(token_ids) < 2:
            raise UsageError("the calibration text is a single token or none; give a longer one")
        length = min(SEQUENCE_LENGTH, len(token_ids), spec.max_positions)
        count = min(SEQUENCES, len(token_ids) // length)
        self._spec, self._noise = spec, noise
        self._device = torch.device("cpu")
        self._loader = Loader(spec, noise, self._device, None, None)
        self._step = Step.of(range(count), [length] * count, [0] * count, token_ids[: count * length])
        self._cache = KVCache(1, count, length, spec.num_kv_heads, spec.head_dim, torch.float32, self._device)
        self._rotary = Rotary.of(spec, length, torch.float32, self._device)
        self._arena = Arena(spec, count * length, torch.float32, self._device)

    @torch.inference_mode()
    def run(self, notify: Notify) -> dict[str, float]:
        """Each unit's omega for a step of the whole range."""
        units = self._spec.units
        unit_done = counted(notify, "measuring the sensitivity of each layer to quantization", len(units))
        hidden_states, noise = self._embed()
        noises, streams = [noise], [hidden_states.square().mean(-1)]
        unit_done()
        for i in range(self._spec.num_layers):
            hidden_states, noise = self._layer(i, hidden_states)
            unit_done()
            noises.append(noise)
            streams.append(hidden_states.square().mean(-1))
        added, logit_variance = self._head(hidden_states)
        unit_done()
        inverse = torch.stack(streams).double().reciprocal()  # [units but the head, tokens]
        disturbance = [(noise * inverse[i:]).mean().item() for i, noise in enumerate(noises)]
        omega = [logit_variance / 2 * value for value in disturbance]
        return dict(zip(units, [*omega, added / 2], strict=True))

    def _embed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, and the noise [t] of the rows they came from."""
        length, table = int(self._step.query_lens[0]), ("embedding", "table.weight")
        embedding = build_embedding(self._loader, W16, torch.float32, length)
        noise, square = torch.cat(self._noise.rows_noise[table]), torch.cat(self._noise.rows_square[table])
        relative = noise[self._step.tokens] / square[self._step.tokens].clamp_min(1e-30)
        hidden_states = embedding(self._step.tokens, self._step.positions, torch.float32)
        return hidden_states, relative.double() * hidden_states.square().mean(-1)

    def _layer(self, i: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states after layer i, and the noise [t] that it writes into them."""
        layer = DecoderLayer(self._spec, self._loader, i, W16)
        rho: dict[str, torch.Tensor] = {}
        added: dict[str, torch.Tensor] = {}

        def observe(name: str, module: QuantLinear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            columns = self._noise.columns[f"layer.{i}", f"{name}.weight"]
            added[name] = output.double().square().mean(-1)
            nu = inputs[0].double().square() @ columns / output.shape[-1]
            rho[name] = nu / added[name].clamp_min(1e-30)

        for name in self._spec.layer_linears:
            getattr(layer, name).register_forward_hook(partial(observe, name))
        stage = DecoderStage([layer], None, None, self._cache, self._rotary, self._arena, torch.float32, self._device)
        factors = 2 if self._spec.gated_mlp else 1
        hidden_states = stage(self._step, hidden_states)
        noise = (rho["qkv"] + rho["out"]) * added["out"] + (factors * rho["up"] + rho["down"]) * added["down"]
        return hidden_states, noise

    def _head(self, hidden_states: torch.Tensor) -> tuple[float, float]:
        """The noise the head adds to a logit, and the variance of a token's logits over the vocabulary."""
        spec = self._spec
        if spec.final_norm:
            norm = build_norm(spec, self._loader, "head", "norm")
            hidden_states = norm(hidden_states, torch.empty_like(hidden_states))
        if projection := self._loader.projection("head"):
            hidden_states = projection(hidden_states)
        table = ("embedding" if spec.tied_embeddings else "head", "table.weight")
        if not spec.tied_embeddings:
            self._loader.table("head", W16)
        square = hidden_states.double().square().mean(0)
        mean, mean_square = self._noise.moments[table] / spec.vocab_size
        added = square @ self._noise.columns[table] / spec.vocab_size
        return added.item(), (square @ (mean_square - mean.square())).item()
