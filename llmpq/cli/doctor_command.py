"""`llmpq doctor`: whether runs would work here, and what to do where they would not."""

from __future__ import annotations

import json
from argparse import Namespace

from llmpq.cli.options import add_devices
from llmpq.cli.parser import Commands
from llmpq.report.progress_bar import progress
from llmpq.report.streams import OUT
from llmpq.spec import Cluster, HostError, parse_devices


def add(commands: Commands) -> None:
    parser = commands.add_command("doctor", execute, "whether runs would work on this host, and what to do")
    add_devices(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def execute(arguments: Namespace) -> None:
    from llmpq.doctor.diagnosis import diagnose
    from llmpq.report.host_report import diagnosis_table

    cluster = None
    if arguments.devices is not None:
        cluster = parse_devices(arguments.devices)
    elif arguments.cluster is not None:
        cluster = Cluster.load(arguments.cluster)
    with progress() as notify:
        diagnosis = diagnose(cluster, notify=notify)
    if arguments.json:
        OUT.print(json.dumps(diagnosis.to_dict(), indent=1), soft_wrap=True)
    else:
        OUT.print(diagnosis_table(diagnosis))
    broken = [f"{finding.topic}, {finding.subject}" for finding in diagnosis.findings if finding.status == "problem"]
    if broken:
        raise HostError(f"runs would not work here: {'; '.join(broken)}; see what to do above")
