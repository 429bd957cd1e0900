"""The model `llmpq` of EleutherAI's lm-evaluation-harness: benchmarks of what is served, through its pipeline.

The harness looks for no models of others. Importing this module makes it known; `python -m llmpq.lm_eval` does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from llmpq.cli.evaluate_command import add_served, read_served
from llmpq.cli.parser import Parser
from llmpq.measure.quantized_model import as_served
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError

_BATCH_SIZE, _MAX_LENGTH = 8, 2048  # where nothing is said
_SCORED = 64  # sequences, between two movements of the progress bar
_FIRST_TOKENS = 32  # generated before the first look for the text that ends an answer


@register_model("llmpq")
class HarnessModel(TemplateLM):
    """A model for lm-eval. `pretrained` is the `--model` of `llmpq eval`, whose options for weights are the others.

    They are written with underscores: `plan`, `bits`, `group_size`. `batch_size` sequences are generated at once, and
    scored in steps of as many tokens as one may have: `max_length`, by default what the model has, at most 2048. The
    harness always says a `device`, which is ignored: devices are those of the plan. Its chat templates are not
    supported. Raises UsageError, and what Engine does.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        batch_size: int | str = _BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        parser = Parser(prog="llmpq eval")
        add_served(parser)
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._model, plan = read_served(parser.parse_args([f"--model={pretrained}", *given]))
        spec = self._model.spec
        # The last token of a sequence is predicted, and not read by the model.
        self.max_length = min(_MAX_LENGTH, spec.max_positions - 1) if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        slots = _BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        weights, plan = as_served(self._model, plan.resized(slots, self.max_length + 1))
        self._engine = Engine(plan, weights.checkpoint, weights.spec)

    @property
    def eot_token_id(self) -> int:
        return next(iter(self._model.spec.eos_token_ids), 0)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text of which every token is predicted."""
        first = self._model.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._model.tokenizer.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), _SCORED):
                portion = requests[start : start + _SCORED]
                # Of what is too long, the beginning is left out, as in the harness's own models.
                sequences = [(before + after)[-self.max_length - 1 :] for _, before, after in portion]
                for (texts, _, after), scores in zip(portion, self._engine.score(sequences), strict=True):
                    count = len(after)
                    if count > len(scores.log_probs):
                        raise UsageError(
                            f"an answer has {count} tokens, more than the {self.max_length} of max_length; raise that"
                        )
                    answer = sum(scores.log_probs[-count:]), scores.likeliest[-count:] == after
                    found.append(answer)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(portion))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [_Answer(self, *request.args) for request in requests]
        waiting, tokens = answers, _FIRST_TOKENS
        with tqdm(total=len(answers), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            while waiting:
                # A text that ends an answer is seen after the fact: the pipeline knows end-of-sequence tokens alone.
                sampling = [answer.sampling(tokens) for answer in waiting]
                result = self._engine.generate([answer.token_ids for answer in waiting], sampling)
                for answer, generated in zip(waiting, result.sequences, strict=True):
                    answer.extend(generated.token_ids, generated.finish_reason == "stop")
                bar.update(sum(answer.ended for answer in waiting))
                waiting, tokens = [answer for answer in waiting if not answer.ended], 2 * tokens
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self._model.tokenizer.decode(token_ids)


class _Answer:
    """A request to continue a text until one of some others comes."""

    def __init__(self, model: HarnessModel, context: str, options: dict[str, Any]) -> None:
        options = normalize_gen_kwargs(options, model.max_gen_toks)
        self._model = model
        self._until: list[str] = options.pop("until")
        self._limit: int = options.pop("max_gen_toks")
        options.pop("do_sample")
        if unknown := set(options) - {"temperature", "top_k", "top_p", "seed"}:
            raise UsageError(f"{min(unknown)!r} is no option of sampling here; take it out of the generation_kwargs")
        self._sampling = SamplingParams(**options)
        room = model.max_length - self._limit
        if room < 1:
            raise UsageError(
                f"{self._limit} tokens are to be generated, and max_length is {model.max_length}, the text before them "
                "included; lower max_gen_toks"
            )
        self._prompt = (model.tok_encode(context) or [model.prefix_token_id])[-room:]
        self._tokens: list[int] = []
        self.ended = False

    @property
    def token_ids(self) -> list[int]:
        """Those of the text and of the answer so far."""
        return [*self._prompt, *self._tokens]

    def sampling(self, tokens: int) -> SamplingParams:
        """For at most so many tokens more."""
        return replace(self._sampling, max_tokens=min(tokens, self._limit - len(self._tokens)))

    def extend(self, token_ids: Sequence[int], stopped: bool) -> None:
        self._tokens += token_ids
        whole = self._model.text_of(self._tokens)
        self.text: str = postprocess_generated_text(whole, self._until, None)
        self.ended = stopped or len(self._tokens) >= self._limit or len(self.text) < len(whole)
