"""Sequences on a device: one packed tensor, that a captured graph reads and each step fills anew."""

from __future__ import annotations

import pytest
import torch

from llmpq.kernels import DeviceSequences
from tests.support.kv_caches import sequences

CPU = torch.device("cpu")


def lists(found: DeviceSequences) -> dict[str, list[int]]:
    names = ("slots", "query_starts", "context_lens", "token_sequences", "positions")
    return {name: getattr(found, name).tolist() for name in names}


def test_a_device_gets_every_length_and_position_in_one_aligned_tensor() -> None:
    found = sequences([3, 0, 5], [2, 1, 3], [2, 9, 5]).on(CPU)
    assert lists(found) == {
        "slots": [3, 0, 5],
        "query_starts": [0, 2, 3, 6],
        "context_lens": [2, 9, 5],
        "token_sequences": [0, 0, 1, 2, 2, 2],
        "positions": [0, 1, 8, 2, 3, 4],
    }
    for part in (found.slots, found.query_starts, found.context_lens, found.token_sequences, found.positions):
        assert part.dtype == torch.int32 and part.is_contiguous()
        assert part.untyped_storage().data_ptr() == found.packed.data_ptr() and part.data_ptr() % 16 == 0


def test_a_step_s_sequences_are_copied_once() -> None:
    of = sequences([1], [1], [4])
    assert of.on(CPU) is of.on(CPU)


def test_buffers_are_absent_until_they_become_sequences_and_behind_them() -> None:
    room = DeviceSequences.absent(4, CPU)
    nobody = {"slots": [0] * 4, "query_starts": [*range(5)], "context_lens": [0] * 4, "token_sequences": [0] * 4}
    assert lists(room) == {**nobody, "positions": [-1] * 4}
    for slots, lens in (([2, 7, 1], [9, 1, 30]), ([6], [5]), ([], []), ([3, 2, 1, 0], [1, 2, 3, 4])):
        count = len(slots)
        room.copy_(sequences(slots, [1] * count, lens))
        absent = [0] * (4 - count)
        assert lists(room) == {
            "slots": slots + absent,
            "query_starts": [*range(5)],
            "context_lens": lens + absent,
            "token_sequences": [*range(count), *absent],
            "positions": [n - 1 for n in lens] + [-1] * (4 - count),
        }


@pytest.mark.parametrize("lens", [([0, 1, 2], [1, 1, 1]), ([0], [2])], ids=["too many", "not one token each"])
def test_buffers_take_no_more_than_they_were_made_for(lens: tuple[list[int], list[int]]) -> None:
    slots, query_lens = lens
    with pytest.raises(ValueError, match="do not fit where 2 of 2 are expected"):
        DeviceSequences.absent(2, CPU).copy_(sequences(slots, query_lens, query_lens))


def test_tables_of_blocks_are_filled_up_and_those_of_slots_take_their_place() -> None:
    of = sequences([3, 0], [2, 1], [70, 9], [[7, 5], [2, 0]])
    assert of.on(CPU).tables.tolist() == [[7, 5], [2, 0]] and of.num_blocks == 8
    room = DeviceSequences.absent(3, CPU, 4)
    assert room.tables.tolist() == [[0] * 4] * 3
    room.copy_(sequences([1, 0], [1, 1], [70, 9], [[7, 5], [2, 0]]))
    assert room.tables.tolist() == [[7, 5, 0, 0], [2, 0, 0, 0], [0] * 4]
    room.copy_(sequences([2], [1], [9]))
    assert room.tables.tolist() == [[8, 9, 10, 11], [0] * 4, [0] * 4]
    assert room.tables.data_ptr() % 16 == 0
    with pytest.raises(ValueError, match="tables have 5 columns, but there is room for 4"):
        room.copy_(sequences([0], [1], [1], [[1, 2, 3, 4, 5]]))


def test_placed_sequences_are_read_from_the_buffers() -> None:
    room, of = DeviceSequences.absent(2, CPU), sequences([0, 1], [1, 1], [1, 1])
    placed = of.placed(room)
    assert placed.on(CPU) is room and of.on(CPU) is not room
    with pytest.raises(ValueError, match="2 sequences of 2 tokens are placed, expected 1 of 3"):
        sequences([0], [3], [3]).placed(room)
