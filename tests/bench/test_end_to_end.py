"""The comparison of whole engines: how answers become rows, what a child says and how it dies. No rival is needed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.end_to_end import command, goals, models
from bench.end_to_end.bounds import Work, phase_works
from bench.end_to_end.child import Job, serve
from bench.end_to_end.contenders import CONTENDERS, JUDGED, TWO_STAGES, Contender, chosen, is_ours
from bench.end_to_end.first_token import by_first_token
from bench.end_to_end.ours import plan_for
from bench.end_to_end.processes import Child, ContenderError
from bench.end_to_end.rows import Cell, bound_share, cell_records, merged, met, second_thread
from bench.kernels.rivals import rounds
from bench.process_tree import ended_in_order, own_seconds
from bench.tables import end_to_end
from llmpq.checkpoint.model_files import open_model

CELL = Cell("smollm2", 2, 8, 128, 64)
CEILINGS = {"read_bytes_per_s": 10e9, "fp32_flop_per_s": 1e11, "int8_op_per_s": 4e11}
FAKE = "tests.support.fake_contender"
JOB = Job("demo", "folder", "file.gguf", "work", threads=2)


def answers(*seconds: tuple[float, float], busy: float = 1.0) -> list[dict[str, Any]]:
    return [{"prefill_s": prefill, "decode_s": decode, "busy": [busy, busy / 2]} for prefill, decode in seconds]


def works() -> dict[str, dict[str, Work]]:
    return {JUDGED: {"prefill": Work(1e9, 4e10, 1e10), "decode": Work(5e9, 4e9, 1e9)}}


def records(**found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    named = {
        {"ours": JUDGED, "stages": TWO_STAGES, "slow": "llama.cpp Q4_0", "fast": "vLLM bf16"}[n]: f
        for n, f in found.items()
    }
    return cell_records(CELL, named, works(), CEILINGS, amx=False)


def row(found: dict[str, list[dict[str, Any]]], kind: str, phase: str) -> dict[str, Any]:
    (one,) = [record for record in found[kind] if record["phase"] == phase]
    return one


def test_tokens_are_of_whole_prompts_and_of_all_new_tokens_but_the_first() -> None:
    found = records(ours=answers((2.0, 4.0)))
    speeds = {record["phase"]: record["tokens_per_s"] for record in found["rows"]}
    assert speeds == {"prefill": 8 * 128 / 2.0, "decode": 8 * 63 / 4.0, "total": 8 * 64 / 6.0}


def test_the_best_other_is_chosen_for_each_phase_and_none_of_ours() -> None:
    found = records(
        ours=answers((1.0, 1.0)), stages=answers((0.1, 0.1)), slow=answers((4.0, 2.0)), fast=answers((3.0, 9.0))
    )
    assert row(found, "rows", "prefill")["rival"] == "vLLM bf16"
    assert row(found, "rows", "decode")["rival"] == "llama.cpp Q4_0"
    assert [row(found, "rows", phase)["ratio"] for phase in ("prefill", "decode")] == [3.0, 2.0]


def test_a_ratio_pairs_the_rounds() -> None:
    """A slow spell hits both of a round: the ratio of the medians would be 1.5 here."""
    found = records(
        ours=answers((1.0, 1.0), (2.0, 2.0), (30.0, 30.0)), slow=answers((3.0, 3.0), (6.0, 6.0), (3.0, 3.0))
    )
    assert row(found, "rows", "prefill")["ratio"] == 3.0
    assert row(found, "rows", "prefill")["rival_tokens_per_s"] == 8 * 128 / 3.0


def test_without_another_engine_there_is_no_ratio_and_no_verdict() -> None:
    alone = row(records(ours=answers((1.0, 1.0))), "rows", "prefill")
    assert (alone["rival"], alone["ratio"], met(alone)) == (None, None, None)


@pytest.mark.parametrize(
    ("phase", "batch", "threads", "amx", "wanted"),
    [
        ("prefill", 1, 2, False, 3.0),
        ("prefill", 32, 2, False, 4.0),
        ("prefill", 8, 2, True, 5.0),
        ("prefill", 32, 2, True, 6.0),
        ("decode", 1, 2, True, 1.5),
        ("decode", 8, 2, False, 2.5),
        ("decode", 32, 2, False, 4.0),
        ("decode", 32, 1, False, None),
        ("total", 32, 2, False, None),
        ("prefill", 4, 2, False, None),
    ],
)
def test_goals(phase: str, batch: int, threads: int, amx: bool, wanted: float | None) -> None:
    assert goals.ratio(phase, batch, threads, amx) == wanted


def test_goals_are_for_what_is_judged_and_a_share_of_the_bound_counts_too() -> None:
    cell = Cell("smollm2", 2, 1, 128, 64)
    both = {JUDGED: answers((1.0, 1.0)), "llmpq native a8": answers((1.0, 1.0)), "vLLM bf16": answers((9.0, 2.0))}
    shares = works() | {"llmpq native a8": works()[JUDGED]}
    found = cell_records(cell, both, shares, CEILINGS, amx=False)["rows"]
    judged, other = (
        next(r for r in found if r["contender"] == name and r["phase"] == "decode") for name in list(both)[:2]
    )
    assert (judged["goal"], judged["bound_goal"], judged["bound_share"]) == (1.5, 0.55, 0.5)
    assert met(judged) is False  # twice as fast, and still below 55 % of the bound
    assert met(judged | {"bound_share": 0.6}) is True
    assert (other["goal"], other["bound_goal"], met(other)) == (None, None, None)


def test_the_larger_bound_counts_and_a_missing_ceiling_gives_none() -> None:
    assert Work(20e9, 4e11, 1e11).seconds(CEILINGS) == pytest.approx(2.0)
    assert Work(1e9, 4e11, 1e11).seconds(CEILINGS) == pytest.approx(2.0)
    assert Work(1e9, 4e11, 0.0).seconds(CEILINGS | {"amx_int8_op_per_s": 4e12}) == pytest.approx(0.1)
    assert Work(1e9, 1.0, 1.0).seconds({**CEILINGS, "int8_op_per_s": 0.0}) is None
    assert bound_share(works()[JUDGED], "total", 1.4, CEILINGS) == pytest.approx(0.5)  # 0.2 and 0.5 seconds
    assert bound_share(works()[JUDGED], "decode", 1.0, {}) is None


@pytest.mark.parametrize(("activations", "terms"), [("a8", 1), ("a8x2", 2)])
def test_the_work_of_a_phase_counted_token_by_token(tmp_path: Path, activations: str, terms: int) -> None:
    """Against loops over tokens, layers and heads."""
    config = {**models.HALF_BILLION, "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 192, "vocab_size": 320}
    spec = models.write_random(tmp_path / "m", config).spec
    batch, prompt, output = 3, 5, 4
    plan = plan_for(
        spec, replace(JOB, threads=1, options={"bits": 4, "activations": activations}), batch, prompt + output
    )
    layer = 128 * (128 + 2 * 64) + 128 * 128 + 2 * 128 * 192 + 192 * 128
    head = 320 * 128
    found = phase_works(plan, spec, batch, prompt, output)
    int8 = 2 * terms * batch * (2 * layer * prompt + head)
    fp32 = sum(2 * 2 * 2 * 4 * 32 * keys for _ in range(batch) for keys in range(1, prompt + 1))
    assert found["prefill"].int8_operations == int8
    assert found["prefill"].fp32_operations == pytest.approx(fp32)
    weights = sum(spec.unit_bytes(unit, plan.precision(unit)) for unit in ("layer.0", "layer.1", "head"))
    assert found["prefill"].nbytes == weights
    keys = [prompt + step for step in range(1, output)]  # of each step's query, its own included
    assert found["decode"].int8_operations == len(keys) * 2 * terms * batch * (2 * layer + head)
    assert found["decode"].fp32_operations == pytest.approx(sum(batch * 2 * 2 * 2 * 4 * 32 * k for k in keys))
    cached = sum(batch * 2 * k * 2 * 2 * 32 * 2 for k in keys)  # layers, keys and values, heads, float16
    assert found["decode"].nbytes == pytest.approx(len(keys) * weights + cached)


def test_embedding_and_head_have_eight_bits() -> None:
    spec = open_model("demo").spec
    plan = plan_for(spec, replace(JOB, options={"bits": 4, "activations": "a8"}), 8, 192)
    bits = [plan.precision(unit).width for unit in spec.units]
    assert bits == [8, *[4] * 30, 8]
    assert (plan.slots, plan.max_length, plan.cluster.devices[0].threads) == (8, 192, 2)


def test_a_second_thread_is_compared_with_the_first_of_the_same_contender() -> None:
    one = {
        "device": "a",
        "model": "m",
        "threads": 1,
        "batch": 8,
        "phase": "decode",
        "contender": JUDGED,
        "tokens_per_s": 10.0,
    }
    found = second_thread([one, one | {"threads": 2, "tokens_per_s": 15.0}, one | {"device": "b", "threads": 2}])
    assert [(record["device"], record["ratio"], record["goal"]) for record in found] == [("a", 1.5, 1.7)]
    assert met(found[0]) is False
    assert second_thread([one | {"batch": 1}, one | {"batch": 1, "threads": 2}])[0]["goal"] is None


def test_the_pipeline_is_judged_by_its_speed_and_its_slowest_stage() -> None:
    found = records(ours=answers((1.0, 1.0)), stages=answers((1.0, 1.0), busy=0.8), slow=answers((1.0, 1.0)))
    total = row(found, "pipeline", "total")
    assert (total["ratio"], total["goal"], total["busy"], total["busy_goal"]) == (1.0, 0.9, 0.8, 0.9)
    assert met(total) is False
    assert met(row(found, "pipeline", "decode")) is None
    assert not [record for kind in ("rows", "others") for record in found[kind] if record["contender"] == TWO_STAGES]


HEAD = {
    "device": "amd",
    "commit": "one",
    "torch": "2",
    "date": "2026-01-01",
    "amx": False,
    "versions": {},
    "missing": {},
}
HEAD |= {"ceilings": {"2": CEILINGS}, "rounds": 3, "disturbed_rounds": 1, "prompt": 128, "output": 64}


def test_a_new_run_keeps_other_processors_and_other_cells_of_its_commit() -> None:
    first = {
        "rows": [
            {"model": "m", "threads": 1, "batch": b, "phase": "total", "contender": JUDGED, "tokens_per_s": 1.0}
            for b in (1, 8)
        ]
    }
    file = merged({}, HEAD, first)
    file = merged(file, HEAD | {"device": "intel"}, first)
    again = {"rows": [first["rows"][0] | {"tokens_per_s": 2.0}]}

    def found(results: dict[str, Any]) -> list[tuple[str, int, float]]:
        return [(record["device"], record["batch"], record["tokens_per_s"]) for record in results["rows"]]

    same = merged(file, HEAD, again)
    assert sorted(found(same)) == [("amd", 1, 2.0), ("amd", 8, 1.0), ("intel", 1, 1.0), ("intel", 8, 1.0)]
    assert {run["device"]: run["rounds"] for run in same["runs"]} == {"intel": 3, "amd": 6}
    later = merged(file, HEAD | {"commit": "two"}, again)
    assert sorted(found(later)) == [("amd", 1, 2.0), ("intel", 1, 1.0), ("intel", 8, 1.0)]
    assert {run["device"]: run["rounds"] for run in later["runs"]} == {"intel": 3, "amd": 3}


def test_prefill_is_what_one_token_takes_and_its_prompts_are_not_those_of_decode() -> None:
    asked = []

    def seconds(token_ids: Any, output: int) -> float:
        asked.append((token_ids.tolist(), output))
        return 0.5 + 0.25 * output

    assert by_first_token(seconds, [[1, 2, 3]], 5) == {"prefill_s": 0.75, "decode_s": 1.0}
    assert asked == [([[3, 2, 1]], 1), ([[1, 2, 3]], 5)]


class Failing:
    def generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        if output == 0:
            raise ValueError("nothing to do\nat all")
        return {"prefill_s": 1.0, "decode_s": float(output)}


def test_a_command_that_fails_is_answered_by_why_and_the_next_one_is_answered() -> None:
    commands = [{"do": "generate", "prompts": [[1]], "output": n} for n in (0, 2)] + [{"do": "__class__"}]
    out = io.StringIO()
    serve(Failing(), map(json.dumps, commands), out)  # type: ignore[arg-type]
    failed, done, unknown = map(json.loads, out.getvalue().splitlines())
    assert failed == {"error": "ValueError: nothing to do"}
    assert done == {"prefill_s": 1.0, "decode_s": 2.0}
    assert "no command" in unknown["error"]


def test_a_child_knows_its_threads_and_answers_whatever_it_prints() -> None:
    with Child(FAKE, JOB) as child:
        assert child.ask("prepare", batch=2, length=9) is None
        answer = child.ask("generate", prompts=[[1, 2], [3, 4]], output=3)
    assert answer["threads"] == ["2", 2]
    assert (answer["prefill_s"], answer["decode_s"]) == (4.0, 6.0)


def test_what_a_contender_leaves_behind_is_ended_with_it() -> None:
    with Child(FAKE, Job("demo", "", "", "", 1, {"starts": True})) as child:
        left = child.ask("generate", prompts=[[1]], output=2)["left"]
        assert Path(f"/proc/{left}").exists()
    deadline = time.monotonic() + 10
    while _runs(left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(left)


def test_who_is_not_asked_is_stopped_with_all_it_has_started() -> None:
    with Child(FAKE, Job("demo", "", "", "", 1, {"spins": True})) as child:
        for _ in range(2):
            assert child.ask("generate", prompts=[[1]], output=2)["spun"] > 0
            before = own_seconds()
            time.sleep(0.3)
            assert own_seconds() - before < 0.1


def test_sigterm_leaves_contexts_in_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, ended_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def _runs(pid: int) -> bool:
    """Whether it is there, and not only waiting for someone to look at its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"fails": "import"}, "ImportError: no engine here"),
        ({"fails": "load"}, "ended with 7: the engine has crashed"),
    ],
)
def test_a_contender_that_does_not_load_says_why(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ContenderError, match=why):
        Child(FAKE, Job("demo", "", "", "", 1, options))


def test_a_contender_without_its_interpreter_is_missing() -> None:
    with pytest.raises(ContenderError, match="No such file"):
        Child(FAKE, JOB, python="/nowhere/python")


def test_the_cpu_seconds_of_descendants_are_ours() -> None:
    spin = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ntime.sleep(60)"
    before = own_seconds()
    process = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert own_seconds() - before >= 0.35
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes in place of all contenders, on no files, on a machine that is always quiet."""
    fakes = {
        JUDGED: Contender(FAKE, {"bits": 4, "activations": "a8", "speed": 4.0}),
        "llama.cpp Q4_0": Contender(FAKE, {"speed": 1.0}),
        "vLLM bf16": Contender(FAKE, {"fails": "import"}),
        "transformers fp32": Contender(FAKE, {"speed": 9.0, "fails": "second"}),
    }
    monkeypatch.setattr(command, "chosen", lambda parts: fakes)
    monkeypatch.setattr(command.models, "prepare", lambda model, work: JOB)
    monkeypatch.setattr(command, "await_quiet", lambda seconds, own: None)
    monkeypatch.setattr(rounds, "await_quiet", lambda seconds, own: None)
    monkeypatch.setattr(rounds._Load, "foreign", lambda self: 0.0)
    monkeypatch.setattr(command.ceilings, "measure", lambda threads: CEILINGS)


@pytest.mark.usefixtures("quick")
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A contender that dies midway is listed, and counts nowhere."""
    path = tmp_path / "out.json"
    command.main(
        ["--models", "smollm2", "--threads", "1,2", "--batches", "8", "--rounds", "2", "--json-out", str(path)]
    )
    results = json.loads(path.read_text())
    (run,) = results["runs"]
    assert run["missing"]["vLLM bf16"] == "ImportError: no engine here"
    assert run["missing"]["transformers fp32"].startswith("ended with")
    assert {record["contender"] for record in results["others"]} == {"llama.cpp Q4_0"}
    decode = [r for r in results["rows"] if r["phase"] == "decode" and r["threads"] == 2]
    assert [(r["rival"], r["ratio"], r["goal"]) for r in decode] == [("llama.cpp Q4_0", 4.0, 2.5)]
    assert {(r["contender"], round(r["perplexity"], 6)) for r in results["perplexities"]} == {
        (name, round(float(np.exp(0.5)), 6)) for name in (JUDGED, "llama.cpp Q4_0", "transformers fp32")
    }
    assert [r["ratio"] for r in results["second_thread"]] == [1.0] * 3
    printed = capsys.readouterr().out
    assert "missing: vLLM bf16: ImportError: no engine here" in printed
    assert "goals met, missed:" in printed
    text = "\n".join(end_to_end.end_to_end(results))
    assert "llama.cpp Q4_0" in text and "**" in text and "vLLM bf16 (ImportError: no engine here)" in text


@pytest.mark.parametrize(
    "arguments", [["--models", "none"], ["--contenders", "xyz"], ["--output", "1"], ["--python", "x"]]
)
def test_bad_arguments_are_refused_in_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_ours_and_others_are_told_apart() -> None:
    ours = {name for name, contender in CONTENDERS.items() if contender.engine == "ours"}
    assert ours == {name for name in CONTENDERS if is_ours(name)}
    assert list(chosen(["llama.cpp"])) == ["llama.cpp Q4_0", "llama.cpp as stored"]
    assert not CONTENDERS["llama.cpp as stored"].takes_part("0.5B", 1)
    assert not CONTENDERS[TWO_STAGES].takes_part("smollm2", 1)


def test_prompts_are_others_in_every_round_and_the_same_for_all() -> None:
    first, again, other = (command.prompts(CELL, seed) for seed in (0, 0, 1))
    assert first == again
    assert not set(map(tuple, first)) & set(map(tuple, other))
    assert (len(first), len(first[0])) == (8, 128)
