"""What test_pipeline.py runs under torchrun: MODEL PLAN PROMPTS OUT. The first rank shares the plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.torchrun import Rank
from llmpq.spec import Plan


def main(model: str, plan_path: str, prompts_path: str, out: str) -> None:
    rank = Rank.current()
    if rank is None:
        raise SystemExit("start this with torchrun")
    checkpoint = resolve(model)
    text = rank.share(Path(plan_path).read_text() if rank.first else None)
    plan = Plan.from_dict(json.loads(text))
    if rank.rank >= len(plan.stages):
        return
    with Engine(plan, checkpoint, load_spec(checkpoint), rank=rank) as engine:
        if rank.first:
            prompts = json.loads(Path(prompts_path).read_text())
            greedy = SamplingParams(max_tokens=12, ignore_eos=True)
            engine.generate(prompts[:2], greedy)  # the other ranks serve any number of commands
            engine.generate(prompts, greedy).save(out)
        else:
            engine.serve()


main(*sys.argv[1:])
