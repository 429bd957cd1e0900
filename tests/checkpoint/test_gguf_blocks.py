"""GGUF's blocks as QuantTensors: they stand for the numbers that the gguf package makes of them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmpq.checkpoint.gguf_blocks import read_blocks
from llmpq.checkpoint.tensor_index import STORED

gguf = pytest.importorskip("gguf")

SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
kinds = pytest.mark.parametrize("kind", STORED)


def random_rows(n: int, blocks: int, kind: str) -> np.ndarray:
    """Random bytes, uint8 [n, blocks * size], whose scales and offsets are finite: of any size, subnormal ones, too."""
    raw = torch.randint(256, (n, blocks, SIZES[kind]), dtype=torch.uint8).numpy()
    for high in (1, 3) if kind == "Q4_1" else (1,):
        raw[..., high] &= 0xBF  # an exponent of at most 15
    return raw.reshape(n, -1)


@kinds
def test_blocks_stand_for_the_numbers_that_gguf_makes_of_them(kind: str) -> None:
    raw = random_rows(7, 11, kind)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    weight = read_blocks(torch.from_numpy(raw), kind)
    assert weight.shape == (7, 11 * 32)
    assert weight.precision == STORED[kind]
    found = weight.dequantize().numpy()
    assert expected.dtype == found.dtype == np.float32
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))


@kinds
def test_a_row_does_not_depend_on_where_it_lies(kind: str) -> None:
    raw = torch.from_numpy(random_rows(6, 3, kind))
    whole = read_blocks(raw, kind).dequantize()
    assert torch.equal(read_blocks(raw[1::2], kind).dequantize(), whole[1::2])
    assert read_blocks(raw[:0], kind).shape == (0, 96)


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (torch.zeros(1, 18, dtype=torch.uint8), "Q4_K", "kind is 'Q4_K', expected one of Q4_0, Q4_1, Q8_0"),
        (torch.zeros(1, 20, dtype=torch.uint8), "Q4_0", r"raw is torch.uint8 \[1, 20\], expected .* of 18 bytes"),
        (torch.zeros(20, dtype=torch.uint8), "Q4_1", r"expected uint8 \[n, blocks of 20 bytes\] for Q4_1"),
        (torch.zeros(1, 34, dtype=torch.int8), "Q8_0", "raw is torch.int8"),
    ],
)
def test_what_is_no_row_of_blocks_is_refused(raw: torch.Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_blocks(raw, kind)
