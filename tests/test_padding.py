"""Padding: the shape of a micro-batch, and what stands where a sample has ended."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.strategies.padding import PaddingSettings, pad, padded_length

FILL = {"input_ids": 99, "attention_mask": 0, "labels": -100}


def samples(*lengths: int) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": list(range(1, n + 1)), "attention_mask": [1] * n, "labels": [7] * n} for n in lengths
    ]


def test_dynamic_pads_to_the_longest_of_the_micro_batch_on_the_right() -> None:
    batch = pad(samples(3, 1), PaddingSettings(), 16, FILL)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(FILL, torch.int64)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 7, 7], [7, -100, -100]]


def test_fixed_pads_to_max_length() -> None:
    batch = pad(samples(3, 1), PaddingSettings(mode="fixed"), 5, FILL)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99, 99], [1, 99, 99, 99, 99]]


def test_only_the_fields_with_a_fill_are_in_the_batch() -> None:
    assert list(pad(samples(2), PaddingSettings(), 16, {"input_ids": 0})) == ["input_ids"]


def test_arrays_of_any_integer_type_are_taken_as_lists_are() -> None:
    rows = [{"input_ids": np.array([5, 6], dtype=np.int32)}, {"input_ids": np.array([7], dtype=np.uint16)}]
    assert pad(rows, PaddingSettings(), 16, {"input_ids": 0})["input_ids"].tolist() == [[5, 6], [7, 0]]


@pytest.mark.parametrize(
    ("mode", "multiple_of", "longest", "max_length", "expected"),
    [
        ("dynamic", 1, 13, 128, 13),
        ("dynamic", 8, 13, 128, 16),
        ("dynamic", 8, 16, 128, 16),
        ("dynamic", 64, 100, 120, 120),  # no further: the model may have no more positions
        ("fixed", 1, 13, 128, 128),
        ("fixed", 8, 13, 100, 100),
    ],
)
def test_lengths(mode: str, multiple_of: int, longest: int, max_length: int, expected: int) -> None:
    settings = PaddingSettings.model_validate({"mode": mode, "multiple_of": multiple_of})
    assert padded_length(longest, settings, max_length) == expected


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    mode=st.sampled_from(["dynamic", "fixed"]),
    multiple_of=st.integers(1, 20),
    room=st.integers(0, 40),
)
def test_a_batch_is_long_enough_for_every_sample_and_no_longer_than_it_need_be(
    lengths: list[int], mode: str, multiple_of: int, room: int
) -> None:
    longest = max(lengths)
    max_length = longest + room
    settings = PaddingSettings.model_validate({"mode": mode, "multiple_of": multiple_of})
    batch = pad(samples(*lengths), settings, max_length, FILL)
    rows, length = batch["input_ids"].shape
    assert rows == len(lengths)
    assert longest <= length <= max_length
    if mode == "fixed":
        assert length == max_length
    else:
        assert length == max_length or (length % multiple_of == 0 and length - longest < multiple_of)
    assert batch["attention_mask"].sum(1).tolist() == lengths


def test_a_string_stands_for_the_mode() -> None:
    assert PaddingSettings.model_validate("fixed") == PaddingSettings(mode="fixed")
