"""A diagnosis as a person reads it: a line for each finding, what to do under those that are not ok."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmpq.doctor.finding import Diagnosis, Status

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def diagnosis_table(diagnosis: Diagnosis) -> RenderableType:
    table = Table(box=SIMPLE_HEAD, title="This host", title_justify="left", pad_edge=False)
    for name in ("", "what", "status", "found"):
        table.add_column(name, overflow="fold")
    topic = ""
    for finding in diagnosis.findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n→ {finding.advice}", style="" if finding.status == "ok" else "bold")
        table.add_row("" if finding.topic == topic else finding.topic, finding.subject, status, found)
        topic = finding.topic
    return Group(table, Text(summary(diagnosis)))


def summary(diagnosis: Diagnosis) -> str:
    """One line."""

    def counted(status: Status) -> str:
        count = diagnosis.count(status)
        return f"{count or 'no'} {status}{'' if count == 1 else 's'}"

    return f"{counted('problem')}, {counted('warning')}; looked for {diagnosis.seconds:.1f} s"
