"""What the demo model answers at each width and quantizer, beside what it answers in 16 bits.

python -m bench.quality.answers [--group-size 64] [--json-out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import planner
from bench.machine import describe, write_results
from llmpq import SamplingParams, demo
from llmpq.checkpoint.model_files import open_model
from llmpq.measure.quantized_model import as_served
from llmpq.runtime.engine import Engine
from llmpq.spec import NATIVE, W16, ActivationMode, Device, Plan, UnitPrecision


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model = open_model("demo")
    prompts = [model.tokenizer.encode_chat(prompt) for prompt in demo.PROMPTS]
    rtn, gptq = (planner.Constraints(group_size=arguments.group_size, quantizer=name) for name in ("rtn", "gptq"))
    contenders: dict[str, tuple[UnitPrecision, ActivationMode]] = {"16 bits": (W16, "a16"), "native": (NATIVE, "a8x2")}
    for bits, made in ((8, rtn), (4, rtn), (4, gptq), (3, rtn), (3, gptq)):
        contenders[f"{bits} bits, {made.quantizer}"] = (made.precision(bits), "a8x2")
    expected: list[list[int]] = []
    rows: list[dict[str, Any]] = []
    longest = max(map(len, prompts)) + demo.MAX_NEW_TOKENS
    for name, (option, mode) in contenders.items():
        device = Device("cpu0", "cpu", threads=arguments.threads)
        plan = Plan.single(model.spec, device, option, slots=len(prompts), max_length=longest, activations=mode)
        weights, plan = as_served(model, plan)
        with Engine(plan, weights.checkpoint, weights.spec, logits=True) as engine:
            found = answers(engine, prompts, demo.MAX_NEW_TOKENS)
            expected = expected or found
            top1 = agreement(engine, prompts, expected)
        texts = [model.tokenizer.decode(tokens) for tokens in found]
        row = {
            "weights": name,
            "top1_agreement": sum(map(sum, top1)) / sum(map(len, top1)),
            "tokens": sum(map(len, top1)),
            "same_answers": sum(a == b for a, b in zip(found, expected, strict=True)),
            "answers": texts,
        }
        rows.append(row)
        print(name, row["top1_agreement"], *texts[:3], sep="\n    ", flush=True)
    if arguments.json_out:
        header = {"prompts": demo.PROMPTS, "group_size": arguments.group_size, "max_new_tokens": demo.MAX_NEW_TOKENS}
        write_results(arguments.json_out, describe() | header | {"rows": rows})


def answers(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The tokens of each greedy answer."""
    result = engine.generate(prompts, SamplingParams(max_tokens=max_tokens))
    return [list(sequence.token_ids) for sequence in result.sequences]


def agreement(engine: Engine, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> list[list[bool]]:
    """Of each token of the expected answers: whether it is the likeliest after the prompt and those before it."""
    found = []
    for prompt, answer in zip(prompts, expected, strict=True):
        likeliest = engine.logits([*prompt, *answer]).argmax(-1)[len(prompt) - 1 :]
        found.append([int(a) == b for a, b in zip(likeliest, answer, strict=True)])
    return found


if __name__ == "__main__":
    main()
