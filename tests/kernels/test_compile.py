"""torch.compile takes a model of QuantLinears whole: a product is one operator of the graph, for any m."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.kernels import PreparedWeight, gemm, prepare
from llmpq.models.linear import QuantLinear
from llmpq.spec import W16, ActivationMode, Precision
from tests.support.grid import name
from tests.support.reference import random_weight
from tests.support.target import Target

PRODUCTS: tuple[tuple[Precision, ActivationMode], ...] = (
    (Precision(3, 128), "a16"),
    (Precision(4, 32, "asym"), "a16"),
    (Precision(8, None), "a16"),
    (Precision(4, 64), "a8"),
    (Precision(8, 32, "asym"), "a8x2"),
    (W16, "a16"),
)
products = pytest.mark.parametrize(("precision", "activations"), PRODUCTS, ids=map(name, PRODUCTS))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Graphs of one test do not serve another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Watcher:
    """Compiles as "aot_eager" does, and keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @property
    def products(self) -> list[torch.fx.Node]:
        return [node for graph in self.graphs for node in graph.graph.nodes if "llmpq" in str(node.target)]


def weight(target: Target, precision: Precision, n: int = 33, k: int = 70) -> PreparedWeight:
    return prepare(random_weight(n, k, precision), target.device, backend=target.backend)


@products
@torch.inference_mode()
def test_a_compiled_linear_gives_the_bits_of_an_eager_one_for_any_m_in_one_graph(
    target: Target, precision: Precision, activations: ActivationMode
) -> None:
    w = weight(target, precision)
    linear, watcher = QuantLinear(w, torch.randn(33, device=target.device), activations), Watcher()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=watcher)
    for m in (5, 7, 11):  # no size of a weight's tensors, to which torch would bind them
        x = torch.randn(m, 70, device=target.device)
        assert torch.equal(compiled(x), linear(x))
    assert len(watcher.products) == len(watcher.graphs) == 1


def test_a_compiled_model_of_several_linears_gives_the_bits_of_an_eager_one(target: Target) -> None:
    up, down = (QuantLinear(weight(target, Precision(4, 32), *shape)) for shape in ((40, 24), (24, 40)))
    model = torch.nn.Sequential(up, torch.nn.ReLU(), down)
    watcher = Watcher()
    compiled = torch.compile(model, fullgraph=True, backend=watcher)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 24, device=target.device).to(dtype)
        y = compiled(x)
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(y, model(x))
    assert [len(watcher.products), len(watcher.graphs)] == [4, 2]


def test_a_compiled_product_writes_out(target: Target) -> None:
    w, x = weight(target, Precision(4, 32)), torch.randn(3, 70, device=target.device)
    compiled = torch.compile(lambda x, out: gemm(x, w, out=out), fullgraph=True, backend="aot_eager")
    around = torch.zeros(5, 40, device=target.device)
    out = around[1:4, 2:35]
    assert compiled(x, out) is out
    assert torch.equal(out, gemm(x, w))
    assert int(around.count_nonzero()) == int(out.count_nonzero()) > 0


def test_a_graph_checks_its_arguments_when_it_runs(target: Target) -> None:
    compiled = torch.compile(QuantLinear(weight(target, Precision(4, 32))), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"x has shape \[3, 69\], expected \[..., 70\]"):
        compiled(torch.randn(3, 69, device=target.device))


@products
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_what_torch_expects_of_one(
    target: Target, precision: Precision, activations: ActivationMode, bias: bool
) -> None:
    w, p = weight(target, precision), precision
    operands = (torch.randn(3, 70, device=target.device), list(w.data))
    offset = torch.randn(33, device=target.device) if bias else None
    description = (w.backend, w.n, w.k, p.bits, p.group_size, p.zero, activations)
    torch.library.opcheck(torch.ops.llmpq.gemm.default, (*operands, offset, *description))


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_around_a_product(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Its usual cache may hold code for another vector capability than torch has now, which gives wrong numbers.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    w = prepare(random_weight(32, 64, Precision(4, 32)))
    linear = QuantLinear(w, torch.randn(32))
    compiled = torch.compile(lambda x: linear(x.sin()).relu() + 1, fullgraph=True, dynamic=True)
    for m in (2, 6):
        x = torch.randn(m, 64)
        torch.testing.assert_close(compiled(x), linear(x.sin()).relu() + 1)
