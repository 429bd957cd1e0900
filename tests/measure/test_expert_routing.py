"""How often experts are chosen: by a model's routers as transformers counts, and by random routers as they are told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq import workflow
from llmpq.checkpoint import model_files
from llmpq.kernels import route
from llmpq.measure import expert_routing
from llmpq.measure.cases import Cases
from llmpq.measure.expert_routing import ALIKE, ExpertShares, measured_shares
from llmpq.measure.operation_clock import Clock
from llmpq.measure.operation_grid import Ranges
from llmpq.measure.profiling import profile
from llmpq.measure.random_layers import RandomLoader
from llmpq.spec import W16, Cluster, Device, Experts, LayerKind, UsageError, Workload
from planner import Constraints
from tests.support.decoding import CPU, open_model
from tests.support.specs import tiny_model
from tests.support.tiny_models import save_model


def tokens(count: int) -> list[int]:
    return torch.randint(272, (count,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_shares_are_those_of_transformers_routers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_routing, "SEQUENCE_LENGTH", 24)
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    token_ids = tokens(4 * 24)
    found = expert_routing.expert_shares(source, spec, token_ids)
    with torch.no_grad():
        logits = model(torch.tensor(token_ids).view(4, 24), output_router_logits=True).router_logits
    expected = iter(logits)
    for i, shares in enumerate(found.layers):
        experts = spec.layer_kind(i).experts
        if experts is None:
            assert shares == ()
            continue
        chosen = next(expected).view(-1, experts.count).topk(experts.per_token).indices
        counts = [int((chosen == expert).sum()) for expert in range(experts.count)]
        assert shares == tuple(count / len(token_ids) for count in counts)
        assert len(set(shares)) > 1
    assert next(expected, None) is None


def test_shares_of_a_mixture_are_those_of_its_layers_by_rank() -> None:
    one, other = Experts(3, 1, 48, True), Experts(2, 1, 48, True)
    spec = tiny_model(num_layers=4, layer_kinds=tuple(LayerKind(experts=e) for e in (one, other, None, one)))
    shares = ExpertShares(((0.5, 0.2, 0.3), (1.0, 0.0), (), (0.0, 0.1, 0.9)))
    assert shares.of(spec, one) == pytest.approx((0.7, 0.2, 0.1))
    assert shares.of(spec, other) == (1.0, 0.0)
    assert ExpertShares().of(spec, one) == ()


@pytest.mark.parametrize(
    "wanted", [(0.95, 0.5, 0.3, 0.15, 0.05, 0.03, 0.02, 0.0), (0.25,) * 8, (0.9, 0.05, 0.02, 0.02, 0.01, 0.0)]
)
def test_random_routers_choose_for_the_shares_they_are_told(wanted: tuple[float, ...]) -> None:
    """And as many experts as are touched by tokens that choose independently."""
    experts = Experts(len(wanted), round(sum(wanted)), 48, True)
    spec = tiny_model(hidden_size=256, layer_kinds=(LayerKind(experts=experts),))
    torch.manual_seed(0)
    loader = RandomLoader(spec, CPU, Clock(CPU), "a16", {experts: wanted})
    found, touched = torch.zeros(len(wanted)), []
    for _ in range(16):
        x = torch.randn(1024, spec.hidden_size)
        chosen, _ = route(loader.plain("layer.0", "router")(x), experts.per_token, True)
        found += chosen.flatten().bincount(minlength=len(wanted)) / len(x) / 16
        touched += [len(step.unique()) for step in chosen.view(-1, 4, experts.per_token)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=0.03, rtol=0)
    expected = sum(1 - (1 - share) ** 4 for share in wanted)
    assert sum(touched) / len(touched) == pytest.approx(expected, rel=0.1)


def test_layers_that_are_timed_choose_for_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")  # which is not recorded
    experts = Experts(8, 2, 48, True)
    spec = tiny_model(num_layers=1, layer_kinds=(LayerKind(experts=experts),))
    counts = torch.zeros(8)

    def noted(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, weights = route(*arguments, **options)
        if chosen.shape[1] == experts.per_token:
            counts.add_(chosen.flatten().bincount(minlength=8))
        return chosen, weights

    monkeypatch.setattr("llmpq.kernels.route", noted)
    shares = ExpertShares(((0.02, 0.9, 0.9, 0.1, 0.02, 0.02, 0.02, 0.02),))
    torch.manual_seed(0)
    with torch.inference_mode():
        for case in Cases(spec, Ranges(2, 32, 64, 64), CPU, Clock(CPU), shares=shares).all([W16], "a16"):
            case.timed(0)
    assert counts[:2].sum() > 0.7 * counts.sum()  # the best liked come first


def test_tables_of_other_shares_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, cluster = tiny_model(), Cluster((Device("cpu0", "cpu"),))
    keys = []

    def found(kind: str, keys_of: Iterable[str], record: type[Any]) -> dict[str, Any]:
        keys.append(list(keys_of))
        raise UsageError("enough")

    monkeypatch.setattr("llmpq.measure.profiling._found", found)
    for shares in (ALIKE, ExpertShares(((0.5, 0.5),)), ExpertShares(((0.6, 0.4),)), ALIKE):
        with pytest.raises(UsageError, match="enough"):
            profile(spec, cluster, Workload(1, 4, 4), group_size=32, shares=shares)
    assert keys[0] == keys[3] and len({key for (key,) in keys}) == 3


@pytest.mark.parametrize("what", ["dummy weights", "no tokenizer", "no experts"])
def test_where_nothing_can_be_known_all_are_alike(what: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-tied" if what == "no experts" else "mixtral")
    if what == "no tokenizer":
        for path in tmp_path.glob("*tokenizer*"):
            path.unlink()
    model = model_files.open_model(str(tmp_path), "dummy" if what == "dummy weights" else "auto")
    assert measured_shares(model.checkpoint, model.spec) is ALIKE


def test_a_model_is_profiled_with_its_own_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model", "mixtral")
    model = model_files.open_model(str(tmp_path / "model"))
    shares = measured_shares(model.checkpoint, model.spec)
    monkeypatch.setattr(expert_routing, "expert_shares", None)  # from the cache now
    assert measured_shares(model.checkpoint, model.spec) == shares
    told = []
    monkeypatch.setattr(workflow, "profile", lambda *_, **options: told.append(options["shares"]))
    cluster = Cluster((Device("cpu0", "cpu"),))
    workflow.measured_profile(model, cluster, Workload(1, 4, 4), Constraints(group_size=32))
    assert told == [shares]
