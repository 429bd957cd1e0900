"""What is to be typed to run a plan: test_two_hosts.py runs it."""

from __future__ import annotations

import shlex
from dataclasses import replace

from llmpq.report.starting import start_commands
from llmpq.spec import Plan
from tests.support.pipelines import make_plan
from tests.support.planner_instances import model


def on_hosts(*hosts: str) -> Plan:
    plan = make_plan(model(len(hosts)), [1] * len(hosts), 2, 2)
    devices = [replace(device, host=host) for device, host in zip(plan.cluster.devices, hosts, strict=True)]
    return replace(plan, cluster=replace(plan.cluster, devices=tuple(devices)))


OPTIONS = ["--model", "my model", "--plan", "plan.json"]


def test_one_host_takes_one_command() -> None:
    assert start_commands(on_hosts("localhost", "localhost"), OPTIONS) == [
        "llmpq run --model 'my model' --plan plan.json"
    ]


def test_each_host_has_its_own_with_one_secret() -> None:
    lines = start_commands(on_hosts("a", "a", "b"), OPTIONS)
    assert [line.partition(": ")[0] for line in lines] == ["a", "b"]
    words = [shlex.split(line.partition(": ")[2]) for line in lines]
    assert len({each[0] for each in words}) == 1 and words[0][0].startswith("LLMPQ_SECRET=")
    assert start_commands(on_hosts("a", "b"), OPTIONS)[0].split()[1] != words[0][0]
    for node, (each, stages) in enumerate(zip(words, ("2", "1"), strict=True)):
        given = dict(zip(each[2:12:2], each[3:12:2], strict=True))
        assert each[1] == "torchrun" and each[12:] == ["-m", "llmpq.run", *OPTIONS]
        assert given == {
            "--nnodes": "2",
            "--node-rank": str(node),
            "--nproc-per-node": stages,
            "--master-addr": "a",
            "--master-port": "29500",
        }


def test_stages_that_go_back_to_a_host_are_started_one_by_one() -> None:
    lines = start_commands(on_hosts("a", "b", "a"), OPTIONS)
    assert [line.partition(": ")[0] for line in lines] == ["a", "b", "a"]
    for rank, line in enumerate(lines):
        words = shlex.split(line.partition(": ")[2])
        assert {f"RANK={rank}", "WORLD_SIZE=3", "MASTER_ADDR=a", "MASTER_PORT=29500"} < set(words)
        assert words[5:] == ["llmpq", "run", *OPTIONS]
