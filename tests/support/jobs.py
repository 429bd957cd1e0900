"""A model and a plan for jobs, the command of one, its prompts and its results."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny_models
from tests.support.pipelines import UNIFORM, load_spec, make_plan, resolve


def save_model_and_plan(folder: Path) -> None:
    """A model that knows conversations, and a plan with 2 slots of 64 tokens."""
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, max_position_embeddings=128)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    plan = make_plan(load_spec(resolve(str(folder))), [3], 2, 2, slots=2, max_length=64, precisions=UNIFORM)
    plan.save(folder / "plan.json")


def command(folder: Path, prompts: str | Path, output: Path, *more: str) -> list[str]:
    known = ["--model", str(folder), "--plan", str(folder / "plan.json"), "--no-chat", "--max-new-tokens", "40"]
    return ["run", *known, "--prompts", str(prompts), "--output", str(output), "--quiet", *more]


def jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results by their places, without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if (response := line.get("response")) is not None:
            assert response["status_code"] == 200 and response["request_id"].startswith("req-")
            assert response["body"].pop("id")[-24:] == response.pop("request_id")[-24:]
            assert abs(response["body"].pop("created") - time.time()) < 3600
    return sorted(lines, key=lambda line: (int(line["id"].partition("-")[0]), line.get("choice", 0)))
