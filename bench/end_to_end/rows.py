"""From the seconds of all contenders to rows: ours beside the best other, the second thread, the pipeline. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.end_to_end import goals
from bench.end_to_end.bounds import Work
from bench.end_to_end.contenders import JUDGED, TWO_STAGES, is_ours
from bench.kernels.rivals.pairing import spread

PHASES = ("prefill", "decode", "total")
LISTS = ("rows", "others", "second_thread", "pipeline", "perplexities")  # of a result file
_CELL = ("device", "model", "threads", "batch")

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What was run: `batch` prompts of `prompt` tokens, `output` more of each."""

    model: str
    threads: int
    batch: int
    prompt: int
    output: int

    @property
    def fields(self) -> Record:
        return {"model": self.model, "threads": self.threads, "batch": self.batch}

    def tokens(self, phase: str) -> int:
        """Tokens of a phase. Prefill makes the first new one of each sequence; all new ones count in the total."""
        per_sequence = {"prefill": self.prompt, "decode": self.output - 1, "total": self.output}
        return self.batch * per_sequence[phase]


def phase_seconds(answer: Mapping[str, Any], phase: str) -> float:
    """Of what a contender answered."""
    prefill, decode = float(answer["prefill_s"]), float(answer["decode_s"])
    return {"prefill": prefill, "decode": decode, "total": prefill + decode}[phase]


@dataclass(frozen=True)
class Speed:
    """A contender in one phase of a cell."""

    seconds: list[float]  # by round, which all contenders of a cell have in common
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)

    def over(self, other: Speed) -> float:
        """The median over the rounds of its speed over the other's."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    @property
    def fields(self) -> Record:
        return {"tokens_per_s": self.tokens_per_s, "spread": spread(self.seconds)}


def speeds(cell: Cell, answers: Mapping[str, Sequence[Mapping[str, Any]]], phase: str) -> dict[str, Speed]:
    """By contender, whose answers are in the order of the rounds."""
    return {
        name: Speed([phase_seconds(answer, phase) for answer in found], cell.tokens(phase))
        for name, found in answers.items()
    }


def best_other(found: Mapping[str, Speed]) -> str | None:
    """The fastest that is not ours."""
    others = [name for name in found if not is_ours(name)]
    return max(others, key=lambda name: found[name].tokens_per_s, default=None)


def bound_share(works: Mapping[str, Work], phase: str, seconds: float, ceilings: Mapping[str, float]) -> float | None:
    """The least seconds of a phase over those it took; None if a ceiling is missing."""
    parts = ("prefill", "decode") if phase == "total" else (phase,)
    least = [works[part].seconds(ceilings) for part in parts]
    return None if None in least else sum(part for part in least if part is not None) / seconds


def cell_records(
    cell: Cell,
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    works: Mapping[str, Mapping[str, Work]],
    ceilings: Mapping[str, float],
    amx: bool,
) -> dict[str, list[Record]]:
    """All that one cell says, as parts of LISTS. `works` are those of ours, by phase."""
    records: dict[str, list[Record]] = {"rows": [], "others": [], "pipeline": []}
    for phase in PHASES:
        found = speeds(cell, answers, phase)
        rival = best_other(found)
        for name, speed in found.items():
            head = {**cell.fields, "phase": phase, "contender": name}
            if not is_ours(name):
                records["others"].append(head | speed.fields)
            elif name == TWO_STAGES:
                if JUDGED in found:
                    records["pipeline"].append(head | speed.fields | _pipeline(phase, found, answers[name]))
            else:
                seconds = statistics.median(speed.seconds)
                judged = name == JUDGED
                records["rows"].append(
                    head
                    | speed.fields
                    | {
                        "bound_share": bound_share(works[name], phase, seconds, ceilings),
                        "bound_goal": goals.bound_share(phase, cell.batch, cell.threads) if judged else None,
                        "rival": rival,
                        "rival_tokens_per_s": None if rival is None else found[rival].tokens_per_s,
                        "ratio": None if rival is None else speed.over(found[rival]),
                        "goal": goals.ratio(phase, cell.batch, cell.threads, amx) if judged else None,
                    }
                )
    return records


def _pipeline(phase: str, found: Mapping[str, Speed], answers: Sequence[Mapping[str, Any]]) -> Record:
    """Two stages beside one process; `busy` is what its slowest stage was of decode."""
    judged = phase == "total"
    return {
        "rival": JUDGED,
        "rival_tokens_per_s": found[JUDGED].tokens_per_s,
        "ratio": found[TWO_STAGES].over(found[JUDGED]),
        "goal": goals.PIPELINE if judged else None,
        "busy": statistics.median(max(answer["busy"]) for answer in answers),
        "busy_goal": goals.BUSY if judged else None,
    }


def second_thread(rows: Sequence[Record]) -> list[Record]:
    """What two threads bring over one, of ours, wherever both were run."""
    by_key = {
        (row["device"], row["model"], row["batch"], row["phase"], row["contender"], row["threads"]): row for row in rows
    }
    found = []
    for (device, model, batch, phase, contender, threads), one in by_key.items():
        two = by_key.get((device, model, batch, phase, contender, 2))
        if threads != 1 or two is None:
            continue
        judged = contender == JUDGED and phase != "total"
        found.append(
            {
                "device": device,
                "model": model,
                "batch": batch,
                "phase": phase,
                "contender": contender,
                "tokens_per_s": two["tokens_per_s"],
                "ratio": two["tokens_per_s"] / one["tokens_per_s"],
                "goal": goals.SECOND_THREAD.get(batch) if judged else None,
            }
        )
    return found


_LEAST = (("ratio", "goal"), ("bound_share", "bound_goal"), ("busy", "busy_goal"))


def met(row: Record) -> bool | None:
    """None: there is no goal, or what it is about could not be measured."""
    reached = [
        row[what] >= row[least] for what, least in _LEAST if row.get(least) is not None and row.get(what) is not None
    ]
    return all(reached) if reached else None


def merged(old: Record, head: Record, records: Mapping[str, Sequence[Record]]) -> Record:
    """A result file with what was found now on the processor `head["device"]`.

    Of other processors all stays; of this one what the same commit found in other cells.
    """
    device, commit = head["device"], head["commit"]
    runs = {run["device"]: run for run in old.get("runs", [])}
    before = runs.get(device)
    keeps = before is not None and before["commit"] == commit
    if before is not None and keeps:
        head = head | {
            "ceilings": before["ceilings"] | head["ceilings"],
            "rounds": before["rounds"] + head["rounds"],
            "disturbed_rounds": before["disturbed_rounds"] + head["disturbed_rounds"],
        }
    results: Record = {"runs": [*(run for name, run in runs.items() if name != device), head]}
    for kind in LISTS:
        new = [{"device": device, **record} for record in records.get(kind, [])]
        measured = {_key(record) for record in new}
        kept = [
            record
            for record in old.get(kind, [])
            if record["device"] != device or (keeps and _key(record) not in measured)
        ]
        results[kind] = kept + new
    results["second_thread"] = second_thread(results["rows"])
    return results


def _key(record: Record) -> tuple[Any, ...]:
    """The cell that a record is of; a perplexity is of a model."""
    return tuple(record.get(name) for name in _CELL)
