"""global_batch_size = micro_batch_size x gradient_accumulation_steps x ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.strategies.accumulation import (
    DEFAULT_MICRO_BATCH_SIZE,
    Batch,
    BatchError,
    loss_weight,
    solve_batch,
)

sizes = st.integers(1, 200)
ranks = st.integers(1, 64)
maybe = st.one_of(st.none(), sizes)


@given(ranks=ranks, total=st.one_of(st.none(), st.integers(1, 5000)), micro=maybe, steps=maybe)
def test_an_answer_keeps_what_was_given_and_fills_the_global_batch(
    ranks: int, total: int | None, micro: int | None, steps: int | None
) -> None:
    """Whatever is given: either the sizes fit together, or the error points at one that was given."""
    given_sizes = {
        "global_batch_size": total,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": steps,
    }
    batch = error = None
    try:
        batch = solve_batch(ranks, total, micro, steps)
    except BatchError as refusal:
        error = refusal
    if error is not None:
        assert given_sizes[error.key] is not None
        assert str(ranks) in f"{error} {error.hint}"
        return
    assert batch is not None
    assert batch.global_batch_size == batch.micro_batch_size * batch.gradient_accumulation_steps * ranks
    for key, value in given_sizes.items():
        assert value in (None, getattr(batch, key))
        assert getattr(batch, key) >= 1


@given(ranks=ranks, micro=sizes, steps=sizes)
def test_any_two_of_three_give_the_third(ranks: int, micro: int, steps: int) -> None:
    whole = Batch(micro * steps * ranks, micro, steps)
    assert solve_batch(ranks, whole.global_batch_size, micro, steps) == whole
    assert solve_batch(ranks, whole.global_batch_size, micro) == whole
    assert solve_batch(ranks, whole.global_batch_size, None, steps) == whole
    assert solve_batch(ranks, None, micro, steps) == whole


@given(ranks=ranks, micro=sizes, steps=sizes, excess=st.integers(1, 1000))
def test_three_that_disagree_are_an_error_that_shows_the_numbers(
    ranks: int, micro: int, steps: int, excess: int
) -> None:
    product = micro * steps * ranks
    with pytest.raises(BatchError) as refusal:
        solve_batch(ranks, product + excess * ranks, micro, steps)
    for number in (product, product + excess * ranks, micro, steps, ranks):
        assert str(number) in str(refusal.value)


@given(ranks=ranks, share=sizes)
def test_a_global_batch_alone_is_cut_into_the_largest_even_micro_batches(ranks: int, share: int) -> None:
    batch = solve_batch(ranks, ranks * share)
    assert batch.micro_batch_size <= DEFAULT_MICRO_BATCH_SIZE
    larger = range(batch.micro_batch_size + 1, min(share, DEFAULT_MICRO_BATCH_SIZE) + 1)
    assert all(share % size for size in larger)


@given(ranks=ranks, micro=sizes)
def test_without_a_global_batch_there_is_no_accumulation_and_a_micro_batch_of_8(
    ranks: int, micro: int
) -> None:
    assert solve_batch(ranks) == Batch(8 * ranks, 8, 1)
    assert solve_batch(ranks, micro_batch_size=micro) == Batch(micro * ranks, micro, 1)
    assert solve_batch(ranks, gradient_accumulation_steps=micro) == Batch(8 * micro * ranks, 8, micro)


@given(ranks=st.integers(2, 64), total=st.integers(1, 5000))
def test_a_global_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can(
    ranks: int, total: int
) -> None:
    if total % ranks == 0:
        return
    with pytest.raises(BatchError) as refusal:
        solve_batch(ranks, total)
    proposed = int(refusal.value.hint.rsplit(" ", 1)[-1])
    assert proposed % ranks == 0
    assert abs(proposed - total) < ranks
    solve_batch(ranks, proposed)


@given(ranks=ranks, share=sizes, size=sizes, key=st.sampled_from(["micro", "steps"]))
def test_a_size_that_does_not_divide_is_refused_with_one_that_does(
    ranks: int, share: int, size: int, key: str
) -> None:
    def solve(size: int) -> Batch:
        return solve_batch(ranks, share * ranks, **{names[key]: size})

    names = {"micro": "micro_batch_size", "steps": "gradient_accumulation_steps"}
    if share % size == 0:
        solve(size)
        return
    with pytest.raises(BatchError) as refusal:
        solve(size)
    assert refusal.value.key == names[key]
    proposed = int(refusal.value.hint.rsplit(" ", 1)[-1])
    assert proposed <= size
    solve(proposed)


@pytest.mark.parametrize(
    ("sizes", "message", "hint"),
    [
        (
            (4, 64, 8, 3),
            "64 is not micro_batch_size 8 x gradient_accumulation_steps 3 x 4 ranks = 96",
            "give two of the three and the third is computed",
        ),
        ((4, 62), "a global batch of 62 cannot be shared by 4 ranks", "use a multiple of 4, such as 64"),
        (
            (2, 64, 5),
            "micro-batches of 5 do not fill a global batch of 64 on 2 ranks: 64 / 2 / 5 is not whole",
            "use a divisor of 32, such as 4",
        ),
        (
            (1, 64, None, 3),
            "3 steps of accumulation do not divide a global batch of 64 on 1 rank: 64 / 1 / 3 is not whole",
            "use a divisor of 64, such as 2",
        ),
    ],
)
def test_messages(sizes: tuple[int, ...], message: str, hint: str) -> None:
    with pytest.raises(BatchError) as refusal:
        solve_batch(*sizes)
    assert str(refusal.value) == message
    assert refusal.value.hint == hint


@given(
    window=st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=6), min_size=1, max_size=5),
)
def test_every_token_of_a_window_weighs_the_same(window: list[list[int]]) -> None:
    """``window`` holds the tokens of each micro-step on each rank; engines average over the ranks."""
    world_size = len(window)
    count = sum(map(sum, window))
    weight = loss_weight(count, world_size)
    of_each_token = [weight / world_size] * count
    assert sum(of_each_token) == (pytest.approx(1.0) if count else 0.0)
