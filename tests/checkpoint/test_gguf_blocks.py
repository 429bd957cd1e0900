"""GGUF's blocks as QuantTensors: they stand for the numbers that the gguf package makes of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from llmpq.checkpoint.gguf_blocks import read_blocks
from llmpq.checkpoint.tensor_index import STORED
from llmpq.checkpoint.weights import is_finite

gguf = pytest.importorskip("gguf")

SCALES = {  # where a block has its float16 numbers: first the scale, then what the offset is made of
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q3_K": (108,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
}
ROUNDED = ("Q4_K", "Q5_K", "IQ4_XS")  # types whose scales are products
kinds = pytest.mark.parametrize("kind", STORED)
rounded = pytest.mark.parametrize("kind", ROUNDED)


def sizes(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return weights, nbytes


def random_rows(n: int, blocks: int, kind: str) -> np.ndarray:
    """Random bytes, uint8 [n, blocks * size], of both signs and any scale, subnormal ones, too, with finite products.

    The first two blocks have the smallest and a large scale, the last is zero.
    """
    raw = torch.randint(256, (n, blocks, sizes(kind)[1]), dtype=torch.uint8).numpy()
    for low in SCALES[kind]:
        raw[..., low + 1] &= 0xBF  # an exponent of at most 15: below 2
        raw[:, :2, low : low + 2] = np.array([1, 0xE3FF], np.uint16).view(np.uint8).reshape(2, 2)  # 2^-24, -1023.5
    if kind == "MXFP4":
        raw[..., 0] %= 251  # beyond that, products with 12 are infinite
        raw[:, :2, 0] = 0, 1  # 2^-128 and 2^-127, which are subnormal
    raw[:, -1] = 0
    return raw.reshape(n, -1)


def meant(raw: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", [kind for kind in STORED if kind not in ROUNDED])
def test_blocks_stand_for_the_numbers_that_gguf_makes_of_them(kind: str) -> None:
    raw = random_rows(7, 11, kind)
    expected = meant(raw, kind)
    weight = read_blocks(torch.from_numpy(raw), kind)
    assert weight.shape == (7, 11 * sizes(kind)[0])
    assert weight.precision == STORED[kind].precision
    assert weight.scales.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}[STORED[kind].scales]
    found = weight.dequantize().numpy()
    assert expected.dtype == found.dtype == np.float32
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)


@rounded
def test_where_scales_are_products_blocks_are_off_by_no_more_than_their_rounding(kind: str) -> None:
    raw = random_rows(7, 21, kind)
    rounding = 2.0**-11 * (1 + 2.0**-10)  # of each product; what float32 does besides is within the last factor
    expected = meant(raw, kind)
    bound = rounding * np.abs(expected)
    if len(SCALES[kind]) > 1:  # of scale * code and of the offset, each
        blocks = raw.reshape(-1, sizes(kind)[1])
        bound = np.zeros_like(bound)
        for low in SCALES[kind]:
            without = blocks.copy()
            without[:, low : low + 2] = 0
            bound += rounding * np.abs(meant(without.reshape(raw.shape), kind))
    assert STORED[kind].precision.group_size == 32
    found = read_blocks(torch.from_numpy(raw), kind).dequantize().numpy()
    assert np.isfinite(found).all()
    assert (np.abs(found.astype(np.float64) - expected) <= bound).all()
    assert not np.array_equal(found, expected)


@rounded
def test_a_scale_beyond_float16_is_no_finite_number(kind: str) -> None:
    raw = np.full((1, sizes(kind)[1]), 0xFF, np.uint8)  # the largest integers
    for low, factor in zip(SCALES[kind], (3000, 0)):
        raw[:, low : low + 2] = np.array([factor], np.float16).view(np.uint8)
    assert np.isfinite(meant(raw, kind)).all()
    assert not is_finite(read_blocks(torch.from_numpy(raw), kind))


def test_a_scale_of_mxfp4_that_is_no_number_stays_none() -> None:
    assert not is_finite(read_blocks(torch.full((1, 17), 255, dtype=torch.uint8), "MXFP4"))


@kinds
def test_a_row_does_not_depend_on_where_it_lies(kind: str) -> None:
    raw = torch.from_numpy(random_rows(6, 3, kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = read_blocks(raw, kind).dequantize()
    assert torch.equal(read_blocks(raw[1::2], kind).dequantize(), whole[1::2])
    weights, size = sizes(kind)
    assert torch.equal(read_blocks(raw[3:4, size : 2 * size], kind).dequantize(), whole[3:4, weights : 2 * weights])
    assert read_blocks(raw[:0], kind).shape == (0, 3 * sizes(kind)[0])


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (torch.zeros(1, 210, dtype=torch.uint8), "Q6_K", "kind is 'Q6_K', expected one of Q4_0, Q4_1, Q5_0"),
        (torch.zeros(1, 20, dtype=torch.uint8), "Q4_0", r"raw is torch.uint8 \[1, 20\], expected .* of 18 bytes"),
        (torch.zeros(20, dtype=torch.uint8), "Q4_1", r"expected uint8 \[n, blocks of 20 bytes\] for Q4_1"),
        (torch.zeros(1, 34, dtype=torch.int8), "Q8_0", "raw is torch.int8"),
    ],
)
def test_what_is_no_row_of_blocks_is_refused(raw: torch.Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_blocks(raw, kind)
