"""Quality budgets: the fit of losses to sensitivities, rounds of solving and measuring, and both as commands."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from llmpq import workflow
from llmpq.checkpoint.model_files import load_model
from llmpq.cli.main import main
from llmpq.measure.text import validation_text
from llmpq.spec import Device, InfeasibleError, Plan, Precision, Prediction, Solution, Solved, UsageError
from llmpq.tuning.quality_budget import ASKED, MARGIN, ROUNDS, SURE, Found, Loss, LossMap, QualityBudget, plan_within
from tests.support.pipelines import tiny_model


def test_the_map_goes_through_every_point_and_along_powers_between_them() -> None:
    found = LossMap((omega, 0.3 * omega**1.4) for omega in (1.0, 0.01, 0.2))
    for omega in (0.01, 0.03, 0.2, 0.5, 1.0):
        assert found.loss(omega) == pytest.approx(0.3 * omega**1.4)
        assert found.omega(found.loss(omega)) == pytest.approx(omega)


def test_losses_beyond_all_points_are_in_proportion_to_omega() -> None:
    found = LossMap([(0.2, 0.1), (0.3, 0.6)])  # at few bits, units disturb each other
    assert found.loss(0.002) == pytest.approx(0.001) and found.omega(0.001) == pytest.approx(0.002)
    assert found.loss(0.6) == pytest.approx(1.2)
    assert found.loss(0.0) == 0


def test_a_loss_is_no_less_than_that_of_a_point_with_less_omega() -> None:
    found = LossMap([(0.1, 0.03), (0.2, 0.02), (0.4, 0.06)])
    assert found.loss(0.15) == found.loss(0.2) == pytest.approx(0.03)
    assert found.omega(0.0299) < 0.1 < 0.2 < found.omega(0.0301)


def test_points_without_a_loss_say_nothing() -> None:
    for points in ([], [(0.1, -0.01), (0.0, 0.2)]):
        assert LossMap(points).loss(0.3) == pytest.approx(0.3)
    assert LossMap([(0.1, 0.3), (0.2, -0.1)]).loss(0.2) == pytest.approx(0.6)


@pytest.fixture(scope="module")
def solved_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Solved]:
    spec = load_model(tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa")).spec
    plan = Plan.single(spec, Device("cpu0", "cpu"), Precision(4, 32), slots=1, max_length=8)

    def solved(omega: float) -> Solved:
        return Solved(plan, Prediction(1.0, 1.0, 1.0, (1,)), Solution("none", 1.0, 1.0, 0.0, omega, omega))

    return solved


def within(
    limit: float,
    true_loss: Callable[[float], float],
    solved: Callable[[float], Solved],
    reached: list[float],
    spread: float = 0.0,
    kl_share: float = 1.0,
) -> Found:
    """Plans have 97 % of the omega that they may have; `reached` gets that of each.

    A loss is measured with a standard error of `spread` times its root, KL is `kl_share` of it.
    """

    def measured(omega: float) -> Loss:
        return Loss(true_loss(omega), spread * math.sqrt(true_loss(omega)), kl_share * true_loss(omega))

    def solve(omega: float) -> Solved:
        reached.append(omega)
        return solved(0.97 * omega)

    points = [(omega, measured(omega)) for omega in (0.2, 1.5)]
    budget = QualityBudget("perplexity", limit)
    return plan_within(budget, points, solve, lambda found: measured(found.solution.omega), lambda: 0.001)


def smooth(omega: float) -> float:
    """Adds up while it is small, and grows faster than that later."""
    return 0.5 * omega + 0.3 * omega**2


@pytest.mark.parametrize("limit", [0.005, 0.02, 0.1])
def test_a_budget_is_kept_and_used(limit: float, solved_of: Callable[[float], Solved]) -> None:
    found = within(limit, smooth, solved_of, [])
    assert found.rounds == 1
    assert 0.8 * math.log1p(limit) < found.measured == smooth(found.solved.solution.omega) <= math.log1p(limit)
    assert found.predicted == pytest.approx(found.measured, rel=0.15)


@pytest.mark.parametrize("limit", [0.005, 0.02, 0.1])
def test_what_is_measured_with_an_error_stays_that_far_below_the_budget(
    limit: float, solved_of: Callable[[float], Solved]
) -> None:
    spread = 0.02
    found = within(limit, smooth, solved_of, [], spread)
    at_most = found.measured + SURE * spread * math.sqrt(found.measured)
    assert found.rounds == 1
    assert 0.8 * math.log1p(limit) < at_most <= math.log1p(limit)


def test_kl_is_within_the_budget_too(solved_of: Callable[[float], Solved]) -> None:
    found = within(0.05, smooth, solved_of, [], kl_share=2.0)
    assert found.rounds == 1
    assert 0.8 * math.log1p(0.05) < 2 * found.measured <= math.log1p(0.05)


def test_a_plan_below_the_budget_by_less_than_its_error_is_not_taken(solved_of: Callable[[float], Solved]) -> None:
    budget, losses = QualityBudget("kl", 0.01), iter([Loss(0.0095, 0.001, 0.0), Loss(0.0075, 0.001, 0.0)])
    found = plan_within(budget, [(1.0, Loss(1.0, 0.0, 1.0))], solved_of, lambda solved: next(losses), lambda: None)
    assert (found.measured, found.rounds) == (0.0075, 2)


def test_a_plan_that_loses_more_than_was_fitted_tightens_the_next(solved_of: Callable[[float], Solved]) -> None:
    def bent(omega: float) -> float:  # small sensitivities lose more than large ones say
        return float(0.6 * omega**1.3 + 0.02 * min(1.0, omega / 0.02))

    reached: list[float] = []
    found = within(0.04, bent, solved_of, reached)
    assert found.measured <= math.log1p(0.04)
    assert 1 < found.rounds == len(reached) <= ROUNDS
    assert reached == sorted(reached, reverse=True)


def test_what_is_never_kept_is_said_with_what_was_reached(solved_of: Callable[[float], Solved]) -> None:
    with pytest.raises(InfeasibleError, match=r"3 plans were measured, and none keeps to \+1 % of perplexity.* \+4"):
        within(0.01, lambda omega: max(math.log1p(0.04), omega), solved_of, [])


def test_each_round_asks_for_less(solved_of: Callable[[float], Solved]) -> None:
    reached: list[float] = []
    budget = math.log1p(0.01)
    with pytest.raises(InfeasibleError):
        within(0.01, lambda omega: 1.2 * budget, solved_of, reached)
    steps = [after / (0.97 * before) for before, after in itertools.pairwise(reached)]
    assert steps == pytest.approx([share * MARGIN / 1.2 for share in ASKED[1:]])


def test_what_cannot_be_kept_is_said_with_what_can(solved_of: Callable[[float], Solved]) -> None:
    def solve(omega: float) -> Solved:
        raise InfeasibleError("no plan meets it")

    budget = QualityBudget("kl", 0.01)
    with pytest.raises(
        InfeasibleError, match=r"keeps to a mean KL of 0.01: .* may have about .* the best has a mean KL of 0.3,"
    ):
        plan_within(budget, [(1.0, Loss(1.0, 0.0, 1.0))], solve, lambda found: Loss(0.0, 0.0, 0.0), lambda: 0.3)
    with pytest.raises(InfeasibleError, match="no plan meets it"):
        plan_within(budget, [(1.0, Loss(1.0, 0.0, 1.0))], solve, lambda found: Loss(0.0, 0.0, 0.0), lambda: None)
    with pytest.raises(InfeasibleError, match="no plan meets it"):  # one that fits is good enough: quality is not why
        plan_within(budget, [(1.0, Loss(1.0, 0.0, 1.0))], solve, lambda found: Loss(0.0, 0.0, 0.0), lambda: 0.005)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_is_above_0(limit: float) -> None:
    with pytest.raises(UsageError, match="give a number above 0"):
        QualityBudget("kl", limit)


@pytest.mark.slow
def test_a_plan_keeps_to_its_budget_as_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "QUALITY_TOKENS", 2048)
    model = ["--model", str(tiny_model(tmp_path / "model", "llama-gqa").path)]
    options = ["--devices", "cpu:threads=1", "--batch-size", "1", "--prompt-len", "8", "--output-len", "4"]
    for budget, limit, field in (
        (["--max-kl", "0.002", "--kv-bits", "8"], 0.002, "kl"),
        (["--max-ppl-increase", "0.5"], 0.005, "perplexity_increase"),
    ):
        assert main(["plan", *model, *options, *budget, "--out", str(tmp_path / "plan.json")]) == 0
        said = " ".join(capsys.readouterr().out.split())
        solved = Solved.load(tmp_path / "plan.json")
        assert solved.plan.kv_bits == (8 if "--kv-bits" in budget else 16)
        quality = solved.quality
        assert quality is not None and quality.validation <= quality.limit == limit
        assert "against 16 bits: predicted" in said and f"{quality.tokens} tokens of each" in said
        assert main(["eval", *model, "--plan", str(tmp_path / "plan.json"), "--max-tokens", "2048"]) == 0
        assert json.loads(capsys.readouterr().out)[field] == pytest.approx(quality.test, rel=1e-6)
    (tmp_path / "text").write_text(validation_text())
    read = ["--text", str(tmp_path / "text"), "--max-tokens", "2048"]
    assert main(["eval", *model, "--plan", str(tmp_path / "plan.json"), *read]) == 0
    assert json.loads(capsys.readouterr().out)[field] == pytest.approx(quality.validation, rel=1e-6)


def test_too_little_memory_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "TextQuality", None)
    model = ["--model", str(tiny_model(tmp_path / "model", "llama-gqa").path), "--out", str(tmp_path / "plan.json")]
    options = ["--devices", "cpu:threads=1,memory=16KiB", "--batch-size", "1", "--prompt-len", "8", "--output-len", "4"]
    assert main(["plan", *model, *options, "--max-kl", "0.1"]) == 3
    assert "cpu0 lacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--max-kl", "0"], "'0' is not a number above 0"),
        (["--max-kl", "1", "--max-ppl-increase", "1"], "not allowed with"),
        (["--max-ppl-increase", "1", "--bits", "4"], "--bits and --max-ppl-increase both decide the quality"),
        (["--max-kl", "1", "--max-sensitivity", "1"], "--max-sensitivity and --max-kl both decide the quality"),
        (["--max-kl", "1", "--rehearse", "2"], "--rehearse compares plans whose quality was not measured"),
    ],
)
def test_budgets_that_exclude_each_other_are_one_line(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--devices", "cpu", "--out", "plan.json", *options]) == 2
    assert problem in capsys.readouterr().err
