"""What doctor says: findings, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmpq.spec import Record
from llmpq.spec.record import check

if TYPE_CHECKING:
    from llmpq.doctor.probing import Answer

Status = Literal["ok", "warning", "problem"]
_LATER = "run it again when less runs here; first imports are slow, too"
_STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")  # in increasing weight


@dataclass(frozen=True, slots=True)
class Finding(Record):
    """One thing that was looked at. A problem keeps runs from working; a warning makes them slower or fewer."""

    topic: str
    subject: str
    status: Status
    found: str
    advice: str = ""  # what to do about it, or to know more; never missing where it is not ok
    numbers: dict[str, float] = field(default_factory=dict)  # what `found` says, in seconds and bytes

    def validate(self) -> None:
        check(self.status == "ok" or bool(self.advice), "advice", "is missing")


@dataclass(frozen=True, slots=True)
class Diagnosis(Record):
    """All findings, in the order in which they are shown."""

    SCHEMA = "llmpq.diagnosis/1"

    findings: tuple[Finding, ...]
    seconds: float

    def count(self, status: Status) -> int:
        return sum(finding.status == status for finding in self.findings)

    @property
    def status(self) -> Status:
        """The worst of them."""
        return max((finding.status for finding in self.findings), key=_STATUSES.index, default="ok")


def ok(topic: str, subject: str, found: str, numbers: Mapping[str, float] | None = None, advice: str = "") -> Finding:
    return Finding(topic, subject, "ok", found, advice, dict(numbers or {}))


def warning(topic: str, subject: str, found: str, advice: str, numbers: Mapping[str, float] | None = None) -> Finding:
    return Finding(topic, subject, "warning", found, advice, dict(numbers or {}))


def problem(topic: str, subject: str, found: str, advice: str, numbers: Mapping[str, float] | None = None) -> Finding:
    return Finding(topic, subject, "problem", found, advice, dict(numbers or {}))


def unanswered(topic: str, subject: str, answer: Answer, advice: str) -> Finding:
    """Of an answer that tells why nothing came back: a problem, but only a warning if it might still have come."""
    if answer.late:
        return warning(topic, subject, answer.problem, _LATER)
    return problem(topic, subject, answer.problem, advice)
