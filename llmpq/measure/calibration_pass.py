"""A text that goes through a model unit by unit: each unit is loaded, run on all of the text's tokens, and dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.kernels import PreparedWeight
from llmpq.measure.text import evenly
from llmpq.models.arena import Arena
from llmpq.models.decoder import DecoderLayer
from llmpq.models.decoder_stage import DecoderStage
from llmpq.models.ends import Head, build_embedding, build_head
from llmpq.models.kv_cache import KVCache
from llmpq.models.loading import Loader, UnitLoader
from llmpq.models.rotary import rotary_tables
from llmpq.models.step import Step
from llmpq.spec import W16, ModelSpec, Precision, UsageError

# What an error in a row of a shared table costs where the row is copied, beside what it costs on average in the head.
COPIED = 0.1
_ROWS = 8192  # tokens whose products are added up in float32
_COLUMNS = 256  # of a second moment at a time


class CalibrationPass:
    """At most `sequences` pieces from all over a text, of at most `length` tokens, all equally long.

    Computes in float32 on the CPU, by the decoder's own layers and, unless another `loader` makes these, its kernels.
    Keys and values are kept in `cache_dtype` meanwhile.
    Hidden states are [tokens, hidden_size], in memory of their own. Raises UsageError for a text of less than two
    tokens.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        token_ids: Sequence[int],
        sequences: int,
        length: int,
        loader: Loader | None = None,
        *,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(token_ids) < 2:
            raise UsageError("the calibration text is a single token or none; give a longer one")
        self.length = min(length, len(token_ids), spec.max_positions)
        pieces = evenly(range(len(token_ids) // self.length), sequences)
        self.sequences = len(pieces)
        self.tokens = self.sequences * self.length
        device, dtype = torch.device("cpu"), torch.float32
        self.loader = loader or Loader(spec, source, device, None, None)
        lengths = [self.length] * self.sequences
        tokens = [token for i in pieces for token in token_ids[i * self.length : (i + 1) * self.length]]
        self.step = Step.of(range(self.sequences), lengths, [0] * self.sequences, tokens)
        self.rotary = rotary_tables(spec, self.length, dtype, device)
        self._spec = spec
        shape = (1, self.sequences, self.length, spec.num_kv_heads, spec.head_dim)
        self._cache = KVCache(*shape, cache_dtype, dtype, device)
        self._arena = Arena(spec, self.tokens, dtype, device)

    def embed(self, table: PreparedWeight | None = None) -> torch.Tensor:
        """What the first layer reads, with the model's own table or another one."""
        table = table or self.loader.table("embedding", W16)
        embedding = build_embedding(self.loader, table, torch.float32, self.length)
        return embedding(self.step.tokens, self.step.sequences, self._arena).clone()

    def layer(self, index: int, precision: Precision = W16, loader: UnitLoader | None = None) -> DecoderLayer:
        """A decoder layer in `precision`, its weights from `loader` instead of the source's where one is given."""
        return DecoderLayer(self._spec, loader or self.loader, index, precision)

    def run(self, layer: DecoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after a layer that gets `hidden_states`."""
        stage = DecoderStage([layer], None, None, self._cache, self.rotary, self._arena)
        return stage(self.step, hidden_states).clone()

    def head(self, table: PreparedWeight | None = None) -> Head:
        """The head, with the model's own table or another one."""
        return build_head(self.loader, table or self.loader.table("head", W16))

    def before_table(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the head's table multiplies, [t, embedding_dim], for hidden states after the last layer."""
        return self.head().before_table(hidden_states)

    def shared_table(self) -> torch.Tensor:
        """What to know of the inputs of a table that embedding and head share, float64 [embedding_dim, embedding_dim].

        With this for the second moment, what an error costs in the head and where rows are copied is added up. Takes a
        pass through the model as it is.
        """
        x = self.embed()
        for layer in range(self._spec.num_layers):
            x = self.run(self.layer(layer), x)
        x = self.before_table(x)
        moment = second_moment(x)
        moment.diagonal().add_(moment.diagonal().mean(), alpha=COPIED)
        return moment


def mean_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean of a b^T over tokens, float64 [width of a, width of b], for a and b [t, width]; 0 of none."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for p, q in zip(a.split(_ROWS), b.split(_ROWS), strict=True):
        total += p.T @ q
    return total.div_(max(len(a), 1))


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T over tokens, float64 [k, k], for x [t, k]; what is below the diagonal is not computed twice."""
    k = x.shape[1]
    moment = torch.empty(k, k, dtype=torch.float64)
    for start in range(0, k, _COLUMNS):
        stop = min(start + _COLUMNS, k)
        moment[start:stop, start:] = mean_product(x[:, start:stop], x[:, start:])
        moment[stop:, start:stop] = moment[start:stop, stop:].T
    return moment
