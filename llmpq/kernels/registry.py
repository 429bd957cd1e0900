"""What a backend is, which ones can run here, and which one a weight is given to."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmpq.kernels.dispatch import BACKENDS, refusal, select
from llmpq.quant import QuantTensor
from llmpq.spec import ACTIVATION_MODES, Precision, UsageError

if TYPE_CHECKING:
    from llmpq.kernels.weight import ExpertWeights, PreparedWeight


class Backend(Protocol):
    """The functions of a backend's module. Arguments were checked by llmpq/kernels/__init__.py.

    On one backend the bits of a row of `gemm` depend on that row of x alone: not on m, not on the threads. A backend
    with two routes (llmpq/kernels/gemm_path.py) promises it of the fused one only; it has a function `dequantize`, too
    (llmpq/kernels/backends/dense.py).
    """

    ACTIVATION_DTYPES: tuple[torch.dtype, ...]  # what gemm takes as x; others are converted to the first and back
    ACTIVATIONS: tuple[str, ...]  # the modes of ACTIVATION_MODES that gemm has

    def is_available(self) -> str | None:
        """None if it can run on this machine, else the reason why not."""

    def allocate(
        self, n: int, k: int, precision: Precision, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """The data of a PreparedWeight, not filled yet."""

    def fill(
        self,
        data: tuple[torch.Tensor, ...],
        row_start: int,
        part: QuantTensor | torch.Tensor,
        *,
        n: int,
        k: int,
        precision: Precision,
    ) -> None:
        """Write the rows of `part` from row_start on. Rows come in order, in any portions."""

    def gemm(
        self, x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, out: torch.Tensor, activations: str
    ) -> None:
        """out [m, n] = x [m, k] @ w.T + bias [n], all of one of ACTIVATION_DTYPES; m > 0. `activations`: its mode.

        x and out have unit stride along their rows; any distance between rows.
        """

    def grouped_gemm(
        self,
        x: torch.Tensor,
        weights: ExpertWeights,
        experts: torch.Tensor,
        biases: torch.Tensor | None,
        out: torch.Tensor,
        activations: str,
    ) -> None:
        """As `llmpq.kernels.grouped_gemm` says, for x, biases and out of one of ACTIVATION_DTYPES."""

    def embedding(self, ids: torch.Tensor, w: PreparedWeight, out: torch.Tensor) -> None:
        """Rows ids (int64 [t]) of the weight, dequantized, in `out` [t, k]."""


@functools.cache
def load(name: str) -> Any:
    """The module of a backend, or the reason (str) why it cannot be used."""
    try:
        module = importlib.import_module(f"llmpq.kernels.backends.{'triton_gemm' if name == 'triton' else name}")
    except ImportError as error:
        return str(error)
    return module.is_available() or module


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None if it can run here, else with the reason why not."""
    return {name: found if isinstance(found := load(name), str) else None for name in BACKENDS}


@functools.cache
def version() -> str:
    """12 hex digits that change with the compiled extensions, the kernels' Python files and their configurations."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json"), *folder.parent.glob("_c*.so")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def check_backend(name: str, device: torch.device) -> None:
    """Raise ValueError unless the backend can run on the device."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if isinstance(found := load(name), str):
        raise ValueError(f"backend {name!r} is not available: {found}")
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (reason := refusal(name, device.type, _capability(device))):
        raise ValueError(f"backend {name!r} {reason}")


def _capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) unless the device is a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def cache_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend whose attention and norms are used where a stage computes in `dtype` on a device.

    On a GPU "triton" where it runs, unless LLMPQ_BACKEND is "reference". On a CPU "cpu" in float32, and "triton" if
    LLMPQ_BACKEND says so and it is interpreting.
    """
    forced = os.environ.get("LLMPQ_BACKEND")
    if forced != "reference" and (device.type == "cuda" or forced == "triton") and _has_triton(device):
        return "triton"
    if device.type == "cpu" and dtype == torch.float32 and forced in (None, "cpu"):
        return "reference" if isinstance(load("cpu"), str) else "cpu"
    return "reference"


def grouped_pairs(device: torch.device, precision: Precision) -> int:
    """How many pairs of a token and an expert are multiplied without waiting, as in a CUDA graph: up to so many.

    0 on a CPU, whose steps are no graphs, where Triton does not run, and for plain weights.
    """
    if not precision.quantized or cache_backend(device, torch.float16) != "triton":
        return 0
    most: int = load("triton").GROUPED_PAIRS
    return most


@functools.cache
def _has_triton(device: torch.device) -> bool:
    try:
        check_backend("triton", device)
    except ValueError:
        return False
    return True


def check_activations(name: str, activations: str, precision: Precision) -> None:
    """Raise ValueError unless the backend multiplies weights of `precision` in the mode `activations`."""
    if activations not in ACTIVATION_MODES:
        raise ValueError(f"activations is {activations!r}, expected one of {', '.join(ACTIVATION_MODES)}")
    if activations != "a16" and not precision.quantized:
        raise ValueError(f"activations is {activations!r}, but 16-bit weights are always multiplied in a16")
    modes = load(name).ACTIVATIONS
    if activations not in modes:
        raise ValueError(
            f"activations is {activations!r}, but backend {name!r} has only {', '.join(modes)}; choose one of these"
        )


def choose(device: torch.device, precision: Precision, dtype: torch.dtype) -> str:
    """The backend for a weight, if its caller names none."""
    full = not precision.quantized and dtype == torch.float32
    if not full and (forced := os.environ.get("LLMPQ_BACKEND")):
        try:
            check_backend(forced, device)
        except ValueError as error:
            raise UsageError(f"LLMPQ_BACKEND: {error}") from None
        return forced
    available = [name for name, reason in available_backends().items() if reason is None]
    return select(device.type, _capability(device), available, precision, str(dtype).removeprefix("torch."))
