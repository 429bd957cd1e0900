"""Which backend a weight is given to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llmpq.kernels import BACKENDS, available_backends, prepare, registry
from llmpq.kernels.dispatch import refusal, select
from llmpq.quant import quantize
from llmpq.spec import W16, Precision, UsageError

W4 = Precision(4, 64)
EVERY = set(BACKENDS)


@pytest.mark.parametrize(
    ("device", "capability", "available", "precision", "dtype", "choice"),
    [
        ("cpu", (0, 0), EVERY, W4, "float16", "cpu"),
        ("cpu", (0, 0), EVERY, W16, "bfloat16", "cpu"),
        ("cpu", (0, 0), {"reference"}, W4, "float16", "reference"),
        ("cpu", (0, 0), {"reference", "cuda", "triton"}, W4, "float16", "reference"),
        ("cuda", (9, 0), EVERY, W4, "bfloat16", "cuda"),
        ("cuda", (7, 5), EVERY, W4, "float16", "cuda"),
        ("cuda", (7, 0), EVERY, W4, "float16", "reference"),
        ("cuda", (9, 0), {"reference", "cpu", "triton"}, W4, "float16", "triton"),
        ("cuda", (7, 5), {"reference", "cpu", "triton"}, W4, "float16", "reference"),
        ("cpu", (0, 0), EVERY, W16, "float32", "reference"),
        ("cuda", (9, 0), EVERY, W16, "float32", "reference"),
    ],
)
def test_select_takes_the_best_backend_that_fits(
    device: str, capability: tuple[int, int], available: set[str], precision: Precision, dtype: str, choice: str
) -> None:
    assert select(device, capability, available, precision, dtype) == choice


@pytest.mark.parametrize(
    ("backend", "device", "capability", "reason"),
    [
        ("cuda", "cuda", (7, 5), None),
        ("cuda", "cuda", (12, 0), None),
        ("cuda", "cuda", (7, 0), "needs a GPU of compute capability 7.5 or higher, but this one has 7.0"),
        ("triton", "cuda", (7, 5), "needs a GPU of compute capability 8.0 or higher, but this one has 7.5"),
        ("triton", "cpu", (0, 0), "does not run on 'cpu', only on cuda"),
        ("reference", "cuda", (6, 0), None),
    ],
)
def test_a_backend_names_the_capability_that_a_device_lacks(
    backend: str, device: str, capability: tuple[int, int], reason: str | None
) -> None:
    assert refusal(backend, device, capability) == reason


def test_select_refuses_a_device_that_no_backend_knows() -> None:
    with pytest.raises(ValueError, match="no backend runs on 'mps'"):
        select("mps", (0, 0), EVERY, W4, "float16")


def test_the_reference_is_always_available() -> None:
    assert available_backends()["reference"] is None


def test_a_missing_extension_makes_a_backend_unavailable_with_a_reason() -> None:
    code = (
        "import sys; sys.modules['llmpq._cpu'] = None; sys.modules['llmpq._cuda'] = None\n"
        "from llmpq.kernels import available_backends, prepare, gemm\n"
        "import torch\n"
        "found = available_backends()\n"
        "assert found['reference'] is None and found['cpu'] and found['cuda'], found\n"
        "w = prepare(torch.ones(2, 3, dtype=torch.bfloat16))\n"
        "assert w.backend == 'reference' and gemm(torch.ones(1, 3), w).tolist() == [[3.0, 3.0]]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize(torch.randn(4, 64), W4)
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    assert prepare(weight).backend == "reference"


def test_environment_does_not_move_plain_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "cpu")
    assert prepare(torch.zeros(4, 64)).backend == "reference"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "LLMPQ_BACKEND: backend is 'gpu', expected one of reference, cpu, cuda, triton"),
        ("cuda", "LLMPQ_BACKEND: backend 'cuda' (is not available: .|does not run on 'cpu', only on cuda)"),
    ],
)
def test_environment_naming_a_backend_that_cannot_run_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", name)
    with pytest.raises(UsageError, match=message):
        prepare(quantize(torch.randn(4, 64), W4))


def test_a_backend_is_refused_on_a_device_it_does_not_run_on() -> None:
    with pytest.raises(ValueError, match="backend 'reference' does not run on 'meta', only on cpu, cuda"):
        prepare(torch.zeros(4, 4, dtype=torch.float16), "meta", backend="reference")


def test_every_available_backend_has_the_whole_protocol() -> None:
    for name, reason in available_backends().items():
        if reason is None:
            module = registry.load(name)
            functions = ("is_available", "allocate", "fill", "gemm", "grouped_gemm", "embedding")
            for part in ("ACTIVATION_DTYPES", "ACTIVATIONS", *functions):
                assert hasattr(module, part), f"{name}.{part}"
