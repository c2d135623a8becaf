"""Module patterns: which parameters a path with globs and Python's brackets means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.strategies import patterns
from tests import setups

LAYERS = 4
NAMES = [name for name, _ in setups.bert(num_hidden_layers=LAYERS).named_parameters()]
IN_A_LAYER = sum(name.startswith("bert.encoder.layer.0.") for name in NAMES)


def layers(pattern: str, names: list[str] = NAMES) -> list[int]:
    """The encoder layers that ``pattern`` covers as a whole, in order."""
    selected = patterns.select(pattern, names, ["bert"])
    assert all(name.startswith("bert.encoder.layer.") for name in selected)
    numbers = [int(name.split(".")[3]) for name in selected]
    assert all(numbers.count(number) == IN_A_LAYER for number in numbers)
    return sorted(set(numbers))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("encoder.layer", [0, 1, 2, 3]),
        ("encoder.layer[:2]", [0, 1]),
        ("encoder.layer[2:]", [2, 3]),
        ("encoder.layer[0,3]", [0, 3]),
        ("encoder.layer[-1]", [3]),
        ("encoder.layer[::2]", [0, 2]),
        ("encoder.layer[::-1]", [0, 1, 2, 3]),
        ("encoder.layer[0, 2:]", [0, 2, 3]),
        ("encoder.layer[ : 2 ]", [0, 1]),
        ("encoder.layer.1", [1]),
        ("encoder.layer.?", [0, 1, 2, 3]),
        ("*.layer[1]", [1]),
        ("bert.encoder.layer[:2]", [0, 1]),
    ],
)
def test_brackets_pick_layers_as_python_does(pattern: str, expected: list[int]) -> None:
    assert layers(pattern) == expected


bounds = st.one_of(st.none(), st.integers(-30, 30))


@given(count=st.integers(1, 25), start=bounds, stop=bounds, step=bounds.filter(lambda step: step != 0))
def test_a_slice_picks_what_python_picks(
    count: int, start: int | None, stop: int | None, step: int | None
) -> None:
    names = [f"body.block.{index}.weight" for index in range(count)]
    text = ":".join("" if bound is None else str(bound) for bound in (start, stop, step))
    expected = sorted(list(range(count))[slice(start, stop, step)])
    assert patterns.select(f"body.block[{text}]", names) == [names[index] for index in expected]


@given(count=st.integers(1, 25), indices=st.lists(st.integers(-30, 30), min_size=1, max_size=5))
def test_a_list_of_indices_picks_what_python_picks_or_nothing(count: int, indices: list[int]) -> None:
    """One index out of range, for which Python raises, and the pattern matches nothing, which is an error."""
    names = [f"block.{index}.weight" for index in range(count)]
    try:
        expected = {list(range(count))[index] for index in indices}
    except IndexError:
        expected = set()
    text = ",".join(map(str, indices))
    assert patterns.select(f"block[{text}]", names) == [names[index] for index in sorted(expected)]


def test_the_order_of_numbers_is_that_of_the_list_not_of_the_alphabet() -> None:
    names = [f"block.{index}.weight" for index in range(12)]
    assert patterns.select("block[:3]", names) == names[:3]
    assert patterns.select("block[-1]", names) == names[-1:]


def test_a_path_covers_its_module_whole_and_no_namesake() -> None:
    names = ["head.weight", "head.inner.bias", "headless.weight"]
    assert patterns.select("head", names) == ["head.weight", "head.inner.bias"]
    assert patterns.select("head.weight", names) == ["head.weight"]


def test_a_path_may_go_on_behind_a_bracket() -> None:
    selected = patterns.select("encoder.layer[:2].attention", NAMES, ["bert"])
    assert selected == [name for name in NAMES if ".attention." in name and name[19] in "01"]


def test_brackets_nest() -> None:
    names = [f"stages.{stage}.blocks.{block}.weight" for stage in range(3) for block in range(2)]
    assert patterns.select("stages[1:].blocks[0]", names) == [
        "stages.1.blocks.0.weight",
        "stages.2.blocks.0.weight",
    ]


def test_a_star_stands_for_any_characters_dots_included() -> None:
    assert patterns.select("*embeddings*", NAMES) == [name for name in NAMES if "embeddings" in name]
    assert patterns.select("*.attention.*.bias", NAMES) == [
        name for name in NAMES if ".attention." in name and name.endswith(".bias")
    ]
    assert patterns.select("*", NAMES) == NAMES


def test_other_characters_stand_for_themselves() -> None:
    names = ["a.b.weight", "aXb.weight", "a+.weight"]
    assert patterns.select("a.b", names) == ["a.b.weight"]
    assert patterns.select("a+", names) == ["a+.weight"]


def test_the_base_model_is_tried_after_the_root() -> None:
    names = ["embeddings.weight", "bert.embeddings.weight", "bert.pooler.weight"]
    assert patterns.select("embeddings", names, ["bert"]) == ["embeddings.weight"]
    assert patterns.select("pooler", names, ["bert"]) == ["bert.pooler.weight"]
    assert patterns.select("pooler", names) == []


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("encoder.layer[a]", "neither an index nor a slice"),
        ("encoder.layer[]", "neither an index nor a slice"),
        ("encoder.layer[0,]", "neither an index nor a slice"),
        ("encoder.layer[1:2:3:4]", "neither an index nor a slice"),
        ("encoder.layer[::0]", "step of zero"),
        ("encoder.layer[0", "not closed"),
        ("encoder.layer0]", "not closed"),
        ("encoder.layer[[0]]", "not closed"),
        ("  ", "empty"),
    ],
)
def test_a_malformed_pattern_is_refused_without_a_model(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        patterns.check_syntax(pattern)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("embedings", "embeddings"),
        ("encoder.layers[:2]", "encoder.layer"),
        ("roberta.encoder.layer[0]", "bert.encoder.layer"),
        ("poolr", "pooler"),
    ],
)
def test_a_near_miss_finds_the_module_that_was_meant(pattern: str, expected: str) -> None:
    assert patterns.select(pattern, NAMES, ["bert"]) == []
    assert expected in patterns.nearest(pattern, NAMES, ["bert"])


def test_nothing_near_is_no_hint() -> None:
    assert patterns.nearest("zzzzzz", NAMES, ["bert"]) == []
