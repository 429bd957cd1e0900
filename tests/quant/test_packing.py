"""The packed format: exact, and laid out as llmpq/quant/packing.py draws it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq.quant import pack, unpack
from llmpq.quant.packing import packed_words

BITS = (3, 4, 8)


def packed_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """The words of one block of 32 codes, as the drawing says, one bit at a time."""
    words = [0] * bits
    for i, code in enumerate(codes):
        for bit in range(bits):
            if bits == 3 and i >= 24:
                word, position = bit, 4 * (i - 24) + 3
            else:
                width = 8 if bits == 8 else 4
                word, position = divmod(i * width + bit, 32)
            words[word] |= (code >> bit & 1) << position
    return words


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(BITS))
    n, k = draw(st.integers(0, 4)), draw(st.integers(1, 100))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=n * k, max_size=n * k))
    return torch.tensor(values, dtype=torch.uint8).view(n, k), bits


@given(codes_and_bits())
def test_unpack_inverts_pack(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    qweight = pack(codes, bits)
    assert qweight.dtype == torch.int32
    assert qweight.shape == (len(codes), packed_words(codes.shape[1], bits))
    assert torch.equal(unpack(qweight, bits, codes.shape[1]), codes)


@given(st.sampled_from(BITS).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), min_size=32))))
def test_words_are_laid_out_as_drawn(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    padded = codes + [0] * (-len(codes) % 32)
    expected = [word for i in range(0, len(padded), 32) for word in packed_bit_by_bit(padded[i : i + 32], bits)]
    found = pack(torch.tensor([codes], dtype=torch.uint8), bits)[0].tolist()
    assert [word & 0xFFFFFFFF for word in found] == expected


def test_free_top_bits_of_a_3_bit_block_are_a_fourth_word_of_nibbles() -> None:
    codes = torch.randint(8, (1, 32), dtype=torch.uint8)
    w0, w1, w2 = (word & 0xFFFFFFFF for word in pack(codes, 3)[0].tolist())
    fourth = (w0 >> 3 & 0x11111111) | (w1 >> 2 & 0x22222222) | (w2 >> 1 & 0x44444444)
    assert [fourth >> 4 * j & 15 for j in range(8)] == codes[0, 24:].tolist()


@pytest.mark.parametrize("bits", BITS)
def test_a_code_takes_exactly_its_bits(bits: int) -> None:
    assert pack(torch.zeros(2, 96, dtype=torch.uint8), bits).nbytes * 8 == 2 * 96 * bits


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_from_a_strided_view_alike(bits: int) -> None:
    codes = torch.randint(2**bits, (6, 90), dtype=torch.uint8)
    assert torch.equal(pack(codes[::2, 5:70], bits), pack(codes[::2, 5:70].clone(), bits))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(1, 32, dtype=torch.uint8), 5, "bits is 5"),
        (torch.zeros(1, 32, dtype=torch.uint8), 16, "bits is 16"),
        (torch.zeros(1, 32, dtype=torch.int32), 4, "codes is torch.int32"),
        (torch.zeros(32, dtype=torch.uint8), 4, r"codes is .* expected uint8 \[n, k\]"),
        (torch.full((1, 32), 8, dtype=torch.uint8), 3, "value of 8, which does not fit 3 bits"),
        (torch.full((1, 32), 16, dtype=torch.uint8), 4, "value of 16, which does not fit 4 bits"),
    ],
)
def test_pack_refuses(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


@pytest.mark.parametrize(
    ("qweight", "bits", "k", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int32), 6, 32, "bits is 6"),
        (torch.zeros(1, 4, dtype=torch.int64), 4, 32, "qweight is torch.int64"),
        (torch.zeros(4, dtype=torch.int32), 4, 32, "qweight is"),
        (torch.zeros(1, 4, dtype=torch.int32), 4, 33, r"expected int32 \[n, 8\] for k = 33 at 4 bits"),
    ],
)
def test_unpack_refuses(qweight: torch.Tensor, bits: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(qweight, bits, k)
