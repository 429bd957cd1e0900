"""Whether real files compute what they say: greedy tokens and perplexity against transformers on the dequantized file.

    python -m bench.models.real_files [--work FOLDER] [--models demo qwen] [--json-out FILE]

Ours is the whole pipeline, two stages on this host's CPU, every unit native, activations a16. The other side is
transformers' own model class in float32 with weights that the `gguf` package dequantizes: it shares no code with our
reader, our forms of the types or our kernels. Files that no package of the project brings along are put into FOLDER.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch.nn import functional as F
from transformers import AutoTokenizer

from bench.end_to_end.start import even_plan
from bench.machine import describe, versions, write_results
from bench.models import qwen_coder
from bench.models.dequantized import gguf_in_transformers
from llmpq import demo
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.measure.perplexity import WINDOW, windows_of
from llmpq.measure.text import digest, evaluation_text
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import NATIVE, Plan

STAGES = 2
MICROBATCH = 4  # prompts: two of them are on their way at once
TIE = 0.02  # of the logits' standard deviation: they differ by what keys and values lose in 16 bits

MODELS: dict[str, Callable[[Path], str]] = {
    "demo": lambda work: "demo",
    "qwen": lambda work: str(qwen_coder.fetch(work)),
}


@dataclass(frozen=True)
class Difference:
    """A greedy token of ours in whose place the reference has another one."""

    prompt: int
    position: int  # in the answer, from 0
    ours: int
    theirs: int
    margin: float  # by how much the reference prefers its token, in standard deviations of its logits there

    @property
    def is_tie(self) -> bool:
        return self.margin < TIE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-models", metavar="FOLDER")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--max-tokens", type=int, default=4096, help="of the text, for perplexity")
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.models:
        model = open_model(MODELS[name](arguments.work))
        prompts = [model.tokenizer.encode_chat(prompt) for prompt in demo.PROMPTS]
        windows = windows_of(model.tokenizer.encode(evaluation_text()), WINDOW, arguments.max_tokens)
        alike = sum(a == b for a, b in zip(prompts, prompts_in_transformers(model.checkpoint.path), strict=True))
        ours = computed(model, prompts, demo.MAX_NEW_TOKENS, windows)
        found = {"model": name, "types": types_of(model.checkpoint.path), "prompts_alike": alike}
        rows.append(found | judged(ours, gguf_in_transformers(model.checkpoint.path)))
        print(rows[-1], flush=True)
    if arguments.json_out:
        header = {
            "versions": versions(["transformers", "gguf", "tokenizers"]),
            "prompts": demo.PROMPTS,
            "text": digest(evaluation_text()),
            "window": WINDOW,
            "stages": STAGES,
            "tie": TIE,
        }
        write_results(arguments.json_out, describe() | header | {"rows": rows})


def types_of(path: Path) -> dict[str, int]:
    """How many tensors a GGUF file has of each type, the commonest first."""
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors).most_common())


def prompts_in_transformers(path: Path) -> list[list[int]]:
    """The demo's prompts in the file's chat template, by transformers' own reading of template and tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    messages = [[{"role": "user", "content": prompt}] for prompt in demo.PROMPTS]
    return [list(tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"]) for m in messages]


@dataclass(frozen=True)
class Ours:
    """What the pipeline makes of prompts and of windows of a text."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]  # greedy, ends of sequence passed over
    logits: Sequence[torch.Tensor]  # of each prompt and its answer: float32 [tokens - 1, vocabulary]
    windows: Sequence[Sequence[int]]
    log_probs: Sequence[Sequence[float]]  # of the windows' tokens but the first


def computed(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, windows: Sequence[Sequence[int]]) -> Ours:
    """By two stages, every unit native."""
    longest = max(*(len(prompt) + new_tokens for prompt in prompts), *map(len, windows))
    with Engine(native_plan(model, len(prompts), longest), model.checkpoint, model.spec, logits=True) as engine:
        generated = engine.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True)).sequences
        answers = [sequence.token_ids for sequence in generated]
        logits = [torch.tensor(engine.logits([*p, *a])) for p, a in zip(prompts, answers, strict=True)]
        return Ours(prompts, answers, logits, windows, [score.log_probs for score in engine.score(windows)])


def judged(ours: Ours, network: Any) -> dict[str, Any]:
    """The fields of a row that say how far ours is from the reference."""
    differing, furthest = [], 0.0
    for number, (prompt, answer) in enumerate(zip(ours.prompts, ours.answers, strict=True)):
        theirs = logits_of(network, [*prompt, *answer])
        furthest = max(furthest, ((ours.logits[number] - theirs).abs() / theirs.std(-1, keepdim=True)).max().item())
        differing += differences(number, answer, theirs[len(prompt) - 1 :])
    expected = [log_probs_of(network, window) for window in ours.windows]
    return {
        "tokens": sum(map(len, ours.answers)),
        "differences": [asdict(difference) for difference in differing],
        "not_ties": sum(not difference.is_tie for difference in differing),
        "logit_difference": furthest,
        "perplexity": perplexity(ours.log_probs),
        "reference_perplexity": perplexity(expected),
        "predictions": sum(map(len, expected)),
    }


def native_plan(model: Model, slots: int, length: int) -> Plan:
    """Two stages of as many layers, everything as the file stores it, and two micro-batches or more."""
    plan = even_plan(model.spec, STAGES).resized(slots, length)
    plan = replace(plan, prefill_microbatch=min(slots, MICROBATCH), decode_microbatch=min(slots, MICROBATCH))
    return plan.with_precisions([NATIVE] * len(model.spec.units))


def differences(prompt: int, answer: Sequence[int], logits: torch.Tensor) -> list[Difference]:
    """Where an answer is not the reference's own.

    `logits` are the reference's, float32 [len(answer), vocabulary], after the prompt and the answer's tokens so far. Up
    to the first difference these are the tokens of the reference's own greedy search, and from there on those of a
    search that took our token once; so every token of an answer is judged.
    """
    margins = (logits.amax(-1) - logits[range(len(answer)), answer]) / logits.std(-1)
    return [
        Difference(prompt, position, ours, theirs, margin)
        for position, (ours, theirs, margin) in enumerate(
            zip(answer, logits.argmax(-1).tolist(), margins.tolist(), strict=True)
        )
        if ours != theirs
    ]


@torch.inference_mode()
def logits_of(network: Any, tokens: Sequence[int]) -> torch.Tensor:
    """float32 [len(tokens) - 1, vocabulary]: after each token but the last."""
    logits: torch.Tensor = network(input_ids=torch.tensor([tokens[:-1]])).logits[0].float()
    return logits


def log_probs_of(network: Any, tokens: Sequence[int]) -> list[float]:
    """Of each token but the first."""
    targets = torch.tensor(tokens[1:])[:, None]
    found: list[float] = F.log_softmax(logits_of(network, tokens).double(), -1).gather(1, targets)[:, 0].tolist()
    return found


def perplexity(windows: Sequence[Sequence[float]]) -> float:
    return math.exp(-math.fsum(map(math.fsum, windows)) / sum(map(len, windows)))


if __name__ == "__main__":
    main()
