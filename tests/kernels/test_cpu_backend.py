"""What is special to the C++ backend: instruction sets, threads, its layout, forks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
import torch

from llmpq import kernels
from llmpq.kernels import WeightBuilder, available_backends, prepare
from llmpq.kernels.backends.cpu import hand_over_seconds
from llmpq.spec import W16, ActivationMode, Precision
from llmpq.spec.cluster import Isa
from tests.support.grid import name
from tests.support.reference import (
    assert_product,
    attention_float64,
    dense,
    random_weight,
    relative_error,
    rms_norm_float64,
)

if (reason := available_backends()["cpu"]) is not None:
    pytest.skip(reason, allow_module_level=True)

ISAS: tuple[Isa, ...] = get_args(Isa)
ROUNDED: tuple[ActivationMode, ...] = ("a8", "a8x2")
EXACT = (
    *(Precision(3, 32), Precision(4, 64, "asym"), Precision(8, None, "asym"), W16),
    *(Precision(3, 64, "offset"), Precision(4, 32, "offset"), Precision(8, 128, "offset")),
)
PRODUCTS: tuple[tuple[Precision, ActivationMode], ...] = (
    *((precision, "a16") for precision in EXACT),
    *((Precision(bits, 64, "asym" if bits == 4 else "sym"), mode) for bits in (3, 4, 8) for mode in ROUNDED),
    *((Precision(bits, 32, "offset"), mode) for bits in (3, 4, 8) for mode in ROUNDED),
    (Precision(8, None, "asym"), "a8x2"),
)
products = pytest.mark.parametrize(("precision", "activations"), PRODUCTS, ids=map(name, PRODUCTS))
precisions = pytest.mark.parametrize("precision", dict.fromkeys(precision for precision, _ in PRODUCTS), ids=str)
SIZES = [(1, 70, 129), (5, 33, 200), (13, 40, 576), (30, 17, 64)]  # m, n, k: one tile, two, and more

# Run in a process of its own, since an instruction set is chosen once. Prints what it computed as bytes.
PROGRAM = """
import sys, torch
from llmpq import kernels
from llmpq.kernels.backends import cpu
from tests.support.kv_caches import empty_layer, parts, sequences
operands, results = torch.load(sys.argv[1], weights_only=False), {"isa": cpu.isa()}
for name, (x, weight, mode) in operands["gemm"].items():
    w = kernels.prepare(weight, backend="cpu")
    results[name] = (kernels.gemm(x, w, activations=mode), kernels.gemm(torch.eye(x.shape[1]), w))
for dtype in (torch.float32, torch.float16, torch.int8):
    cache = empty_layer(2, 2, 300, 40, dtype)
    qkv, tables, q, lens, scale = operands["attention"]
    for slot in range(2):
        new = qkv[slot].clone()
        kernels.rotate_and_store(new, cache, sequences([slot], [300], [300]), tables)
    results["stored", dtype] = new, *parts(cache)
    for name, options in operands["options"].items():
        results["attention", dtype, name] = kernels.attention(q, cache, sequences(*lens), scale, **options)
results["rms_norm"] = kernels.rms_norm(*operands["norm"], 1e-5)
for activation in kernels.ACTIVATIONS:
    results[activation] = kernels.activate_(operands["norm"][0].clone(), activation, True)
x, logits, experts = operands["experts"]
experts = [kernels.prepare(weight, backend="cpu") for weight in experts]
results["route"] = chosen, weights = kernels.route(logits, 3, False)
for mode in ("a16", "a8x2"):
    out = kernels.grouped_gemm(x, experts, chosen, out=torch.empty(39, 40), activations=mode)
    alone = [kernels.gemm(x[i // 3, None], experts[e], activations=mode) for i, e in enumerate(chosen.flatten())]
    results["grouped", mode] = out, torch.cat(alone)
results["combine"] = kernels.combine(x.view(39, 30), weights, x[:, :30].contiguous(), torch.empty(13, 30))
results["head_norm"] = kernels.head_norm_(x.clone().view(13, 3, 30), operands["norm"][1][:30], 1e-5)
results["scale"] = kernels.scale_(x.clone(), 5.0, 8.0)
results["argmax"] = kernels.argmax(operands["norm"][0], torch.empty(4, dtype=torch.int64))
torch.save(results, sys.argv[2])
"""


def operands() -> dict[str, object]:
    torch.manual_seed(0)
    products = {
        f"{name((precision, mode))}-{m}-{n}-{k}": (torch.randn(m, k), random_weight(n, k, precision), mode)
        for precision, mode in PRODUCTS
        for m, n, k in SIZES
    }
    tables = tuple(torch.randn(2, 300, 40))  # a rotation that stretches, too
    attention = (torch.randn(2, 300, 10, 40), tables, torch.randn(43, 6, 40), ([1, 0], [3, 40], [290, 70]), 0.2)
    options = {
        "plain": {},
        "window": {"window": 60, "cap": 0.7},
        "heads": {"sinks": torch.randn(6), "slopes": torch.rand(6)},
    }
    norm = torch.randn(4, 100), torch.randn(100)
    experts = torch.randn(13, 90), torch.randn(13, 5), [random_weight(40, 90, Precision(4, 32, "asym"))] * 5
    return {"gemm": products, "attention": attention, "options": options, "norm": norm, "experts": experts}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What each instruction set makes of the same operands; on a lesser processor, what takes its place."""
    folder = tmp_path_factory.mktemp("isa")
    torch.save(operands(), folder / "operands")
    found = {}
    for isa in ISAS:
        command = [sys.executable, "-c", PROGRAM, str(folder / "operands"), str(folder / isa)]
        root = str(Path(__file__).parents[2])
        subprocess.run(command, check=True, env={**os.environ, "LLMPQ_ISA": isa, "PYTHONPATH": root})
        found[isa] = torch.load(folder / isa, weights_only=False)
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_isa_never_exceeds_its_cap(results: dict[str, dict[str, object]], isa: Isa) -> None:
    assert ISAS.index(results[isa]["isa"]) <= ISAS.index(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_matches_float64(results: dict[str, dict[str, object]], isa: Isa) -> None:
    truth = operands()
    for key, (x, weight, mode) in truth["gemm"].items():
        y, read_out = results[isa][key]
        assert_product(y, x, weight, activations=mode)
        assert torch.equal(read_out.T, dense(weight)), key
    _, _, q, lens, scale = truth["attention"]
    for dtype in (torch.float32, torch.float16, torch.int8):  # what this instruction set stored
        _, keys, values, *scales = results[isa]["stored", dtype]
        # From [kv_heads, slots * blocks, ...] to [slots, kv_heads, positions, d].
        keys, values = (
            blocks.unflatten(1, (2, -1)).transpose(0, 1).flatten(2, 3)[:, :, :300]
            for blocks in (keys.transpose(3, 4).flatten(2, 3), values)
        )
        if scales:
            scales = [of.unflatten(1, (2, -1)).transpose(0, 1).flatten(2)[:, :, :300, None].double() for of in scales]
            keys, values = keys * scales[0], values * scales[1]
        for variant, options in truth["options"].items():
            exact = attention_float64(q, keys, values[..., :40], *lens, scale, **options)
            assert relative_error(results[isa]["attention", dtype, variant], exact) < 2e-6, variant


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_has_the_operations_of_experts(results: dict[str, dict[str, object]], isa: Isa) -> None:
    """Products are those of each row alone, bit for bit."""
    found = results[isa]
    for mode in ("a16", "a8x2"):
        assert torch.equal(*found["grouped", mode])
    x, logits, _ = operands()["experts"]
    chosen, weights = found["route"]
    assert torch.equal(chosen.long(), logits.topk(3).indices)
    rows = {
        "combine": x[:, :30].double() + (x.view(13, 3, 30).double() * weights[..., None]).sum(1),
        "head_norm": rms_norm_float64(x.view(13, 3, 30), operands()["norm"][1][:30], 1e-5),
        "scale": 8 * torch.tanh(5 * x.double() / 8),
    }
    for operation, exact in rows.items():
        torch.testing.assert_close(found[operation].double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("isa", ["avxvnni", "avx512", "amx"])
def test_a_wider_isa_gives_the_bits_of_avx2(results: dict[str, dict[str, object]], isa: Isa) -> None:
    if results[isa]["isa"] != isa:
        pytest.skip(f"this processor has no {isa}")
    for key in results["avx2"]:
        if key != "isa":
            one, other = results["avx2"][key], results[isa][key]
            pairs = zip(one, other) if isinstance(one, tuple) else [(one, other)]
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), key


def test_unknown_isa_is_refused_in_one_line() -> None:
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", "from llmpq.kernels.backends import cpu; cpu.is_available()"],
        env={**os.environ, "LLMPQ_ISA": "sse9", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    message = "LLMPQ_ISA is 'sse9', expected one of portable, avx2, avxvnni, avx512, amx"
    assert run.stderr.strip().splitlines()[-1].endswith(message)


@pytest.mark.parametrize("m", [1, 12, 50])
@products
def test_threads_do_not_change_a_bit(threads: None, precision: Precision, activations: ActivationMode, m: int) -> None:
    w = prepare(random_weight(1030, 1056, precision), backend="cpu")  # large enough for several threads at m = 1
    x, ids = torch.randn(m, 1056), torch.arange(1030)
    torch.set_num_threads(1)
    y, rows = kernels.gemm(x, w, activations=activations), kernels.embedding(ids, w, torch.float32)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(kernels.gemm(x, w, activations=activations), y)
        assert torch.equal(kernels.embedding(ids, w, torch.float32), rows)


@products
def test_rows_beyond_what_is_packed_at_once_are_multiplied_like_the_first(
    precision: Precision, activations: ActivationMode
) -> None:
    m, n, k = 150, 33, 8192  # 24 rows at once in a16, 96 in a8
    x, weight = torch.randn(m, k), random_weight(n, k, precision)
    w = prepare(weight, backend="cpu")
    y = kernels.gemm(x, w, activations=activations)
    assert_product(y, x, weight, activations=activations)
    for i in (0, 23, 24, 95, 96, 149):
        assert torch.equal(kernels.gemm(x[i : i + 1], w, activations=activations)[0], y[i])


@precisions
def test_layout_does_not_depend_on_how_the_rows_were_portioned(precision: Precision) -> None:
    n, k = 77, 100
    weight = random_weight(n, k, precision)
    whole = prepare(weight, backend="cpu")
    builder = WeightBuilder(n, k, precision, whole.dtype, "cpu", "cpu")
    start = 0
    for count in (1, 3, 12, 17, 40, 4):
        part = weight[start : start + count] if precision == W16 else weight.rows(start, start + count)
        builder.add(part)
        start += count
    for one, other in zip(whole.data, builder.finish().data):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_calls_from_several_python_threads_do_not_disturb_each_other(threads: None) -> None:
    w = prepare(random_weight(1024, 1024, Precision(4, 64)), backend="cpu")
    inputs = [torch.randn(3, 1024) for _ in range(24)]
    expected = [kernels.gemm(x, w) for x in inputs]

    def product(x: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(2)
        return kernels.gemm(x, w)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(product, inputs), expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_child_computes_with_threads_of_its_own() -> None:
    program = """
import os, torch
from llmpq import kernels
from llmpq.spec import Precision
from llmpq.quant import quantize
torch.set_num_threads(2)
w = kernels.prepare(quantize(torch.randn(1024, 1024), Precision(4, 64)), backend="cpu")
x = torch.randn(4, 1024)
y = kernels.gemm(x, w)
out = torch.empty_like(y)
child = os.fork()
if child == 0:
    kernels.gemm(x, w, out=out)
    os._exit(0 if torch.equal(out, y) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, timeout=120)
    assert run.returncode == 0


def test_every_hand_over_is_timed() -> None:
    for threads in (1, 2, 3):
        seconds = hand_over_seconds(threads, 50)
        assert seconds.shape == (50,)
        assert bool((seconds > 0).all()) and bool((seconds < 10).all())
