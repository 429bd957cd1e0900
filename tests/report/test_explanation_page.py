"""The page of `llmpq explain --html`: all of the explanation is in it, it needs nothing else, and it is valid HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

import planner
from llmpq.report import figures
from llmpq.report.console import explanation
from llmpq.report.html_page import page
from llmpq.report.text_tables import explanation_tables, verdict
from llmpq.spec import Cluster, Solved, Workload
from llmpq.spec.formatting import format_bytes, format_cap, format_seconds
from tests.support.planner_instances import instance, priced

VOID = {"meta", "br", "hr", "img", "link", "input"}
FETCHING = {"src", "href", "srcset", "data", "poster", "action", "background", "cite", "formaction", "ping"}


class Parsed(HTMLParser):
    """Checks that elements are closed in order; collects text outside of scripts, table cells and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside in ("td", "th"):
            self.cells[-1] += data
        elif inside != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def explained() -> tuple[Solved, planner.Explanation]:
    memory = (400_000, 300_000, None)
    given = instance(6, slowness=(1.0, 2.5, 1.5), memory=memory, all_devices=True, workload=Workload(8, 32, 16))
    plan = planner.solve(given)
    return plan, planner.explain(plan, given)


@pytest.fixture(scope="module")
def html(explained: tuple[Solved, planner.Explanation]) -> str:
    return page(*explained)


def test_it_is_one_document_that_fetches_nothing(html: str) -> None:
    parsed = Parsed(html)
    assert html.startswith("<!DOCTYPE html>")
    assert [parsed.tags.count(tag) for tag in ("html", "head", "body", "title", "h1")] == [1] * 5
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert not [(name, value) for name, value in parsed.attributes if name in FETCHING]
    own = html.replace(get_plotlyjs(), "")
    assert len(own) < len(html) - 1_000_000  # plotly's program is in it, once
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|import\(", own)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    drawn = [name for script in parsed.scripts for name in re.findall(r'Plotly\.newPlot\(\s*"([\w-]+)"', script)]
    assert drawn == [name for name in ids if (name or "").startswith("figure-")] != []


def test_every_number_of_the_tables_is_in_it(html: str, explained: tuple[Solved, planner.Explanation]) -> None:
    plan, found = explained
    parsed = Parsed(html)
    for sheet in explanation_tables(plan, found).values():
        for row in (sheet.columns, *sheet.rows):
            start = [i for i in range(len(parsed.cells)) if tuple(parsed.cells[i : i + len(row)]) == row]
            assert start, row
    for view in found.units:
        row = [view.unit, view.device, str(view.width), format_bytes(view.weight_bytes), f"{view.omega:.4g}"]
        assert any(parsed.cells[i : i + 5] == row for i in range(len(parsed.cells))), row
    text = " ".join(parsed.text)
    assert f"{plan.prediction.tokens_per_s:.1f} tokens/s" in text
    assert format_seconds(plan.prediction.prefill_s) in text
    for sentence in verdict(plan, found):
        assert sentence in text


def test_names_are_text_and_not_markup() -> None:
    given = instance(3, memory=(None,), slowness=(1.0,))
    name = '</script><b onclick="x">&'
    devices = (replace(given.cluster.devices[0], name=name),)
    profile = replace(given.profile, tables={name: given.profile.tables["d0"]})
    given = replace(given, cluster=Cluster(devices), profile=profile)
    solved = planner.solve(given)
    plan = replace(solved, plan=replace(solved.plan, model="<i>m</i>"))
    parsed = Parsed(page(plan, planner.explain(plan, given)))
    assert name in parsed.cells
    assert "Plan for <i>m</i>" in parsed.text
    assert not {"b", "i"} & set(parsed.tags)
    assert "→" not in "".join(parsed.text)  # one stage: there is no link


def test_the_front_is_a_staircase_with_the_plan_on_it(explained: tuple[Solved, planner.Explanation]) -> None:
    plan, found = explained
    traces = {trace.name: trace for trace in figures.front(plan, found).data}
    best, own = traces["best known"], traces["this plan"]
    for values in (best.x, best.y):
        assert list(values) == sorted(set(values)) and len(values) >= 3
    assert all(speed <= own.y[0] for omega, speed in zip(best.x, best.y) if omega <= own.x[0])


@pytest.fixture(scope="module")
def cheapest() -> tuple[Solved, planner.Explanation]:
    """Of devices that cost 2 and 1 an hour, for the least cost."""
    given = priced(instance(6, slowness=(1.0, 1.5), memory=(640_000, 400_000), workload=Workload(8, 32, 16)), [2, 1])
    plan = planner.solve(given)
    return plan, planner.explain(plan, given)


def _cost(plan: Solved) -> float:
    """Of a million tokens, of these devices."""
    per_hour = sum({"d0": 2, "d1": 1}[stage.device] for stage in plan.plan.stages)
    return per_hour / 3600 * 1e6 / plan.prediction.tokens_per_s


def test_where_cost_is_the_objective_tables_compare_it(cheapest: tuple[Solved, planner.Explanation]) -> None:
    plan, found = cheapest
    tables = explanation_tables(plan, found)
    others = {**found.baselines, **{change.what: change.solved for change in found.changes}}
    assert len(others) > 8
    for sheet in (tables["baselines"], tables["changes"], tables["front"]):
        assert sheet.columns[1:5] == ("1 M tokens cost", "against", "tokens/s", "sensitivity")
        for what, cost, against, speed, *_ in sheet.rows:
            if what in others:
                other = others[what]
                percent = 100 * (_cost(other) / _cost(plan) - 1)
                assert (cost, against) == (f"{_cost(other):.4g}", f"{percent:+.1f} %")
                assert speed == f"{other.prediction.tokens_per_s:.1f}"
    costs = [float(row[1]) for row in tables["front"].rows]
    assert tables["front"].title == "Cost over quality"
    assert costs == sorted(costs, reverse=True) and len(costs) >= 3
    with Console(file=StringIO(), width=200) as console, console.capture() as printed:
        console.print(explanation(plan, found))
    for row in tables["baselines"].rows:
        assert re.search(r"\s+".join(map(re.escape, filter(None, row))), printed.get()), row


def test_the_marginal_value_is_a_change_s_gain_over_its_amount(
    explained: tuple[Solved, planner.Explanation], cheapest: tuple[Solved, planner.Explanation]
) -> None:
    for (plan, found), sign in ((explained, 1), (cheapest, -1)):
        shown = {row[0]: row[-1] for row in explanation_tables(plan, found)["changes"].rows}
        plans = {change.what: change.solved for change in found.changes}
        numbers = [_cost(of) if sign < 0 else of.prediction.tokens_per_s for of in (plan, *plans.values())]  # type: ignore[union-attr]
        gains = dict(zip(plans, (number - numbers[0] for number in numbers[1:]), strict=True))
        less = gains["10 % less sensitivity allowed"]
        assert sign * less < 0
        assert shown["10 % less sensitivity allowed"] == f"{-less / 10:+.3g} per %"
    assert shown["without d1"] == "-"
    # The last one's d0 has 64,000 bytes more.
    assert shown["10 % more memory on d0"] == f"{gains['10 % more memory on d0'] / (64_000 / 2**20):+.3g} per MiB"
    assert gains["10 % more memory on d0"] < 0


def test_units_are_those_of_people() -> None:
    assert [format_seconds(s) for s in (2.0, 0.0315, 0.001, 4.2e-5, 0.0)] == ["2 s", "31.5 ms", "1 ms", "42 µs", "0 µs"]
    assert [format_cap(b) for b in (None, 3 * 2**30, 2**20, 2**19)] == ["no cap", "3.00 GiB", "1.0 MiB", "0.5 MiB"]
