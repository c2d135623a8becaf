"""The planner chooses the fastest way to run a job that fits, and leaves alone what the user fixed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher.plan import auto, gpus, overheads, report
from memlaunch.launcher.plan import search as searching
from memlaunch.launcher.plan.search import (
    ACCUMULATION,
    CHECKPOINTING,
    ENGINE,
    MICRO_BATCH,
    STAGE,
    Candidate,
    Fit,
    Question,
    confirm,
    micro_batches,
    search,
    structures,
)
from memlaunch.launcher.plan.time import Machines
from memlaunch.launcher.plan.traces import Tracer
from tests.test_plan_trace import job, shape

T4 = gpus.find("t4")
BATCHES = frozenset({MICRO_BATCH, ACCUMULATION})


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    """One that remembers, since the tests ask for the same traces."""
    with Tracer("cuda", processes=1, cache=tmp_path_factory.mktemp("traces")) as started:
        yield started


def question(keys: frozenset[str], spare: int = 4 << 30, ranks: int = 2, **strategy: Any) -> Question:
    """A small BERT, 64 samples of 512 tokens a rank, on GPUs with ``spare`` bytes beside the overheads."""
    one = job(ranks=ranks, **strategy)
    one["training"] |= {
        "global_batch_size": 64 * ranks,
        "micro_batch_size": 64,
        "gradient_accumulation_steps": 1,
    }
    machines = Machines(T4, 1, ranks)
    asked = Question(one, keys, {**shape(one, tokens=512), "layers": 4, "parameters": None}, machines)
    fixed = overheads.outside(asked.circumstances) + overheads.reserved(asked.circumstances)
    memory = round((fixed + spare) / (1 - searching.MARGIN))
    return replace(asked, machines=replace(machines, gpu=replace(T4, memory_bytes=memory)))


def exhaustive(question: Question, tracer: Tracer) -> Candidate | None:
    """The best of all candidates, each traced as a whole."""
    found = []
    for structure in structures(question):
        fit = Fit.of(question, structure, micro_batches(question), tracer)
        for size in micro_batches(question):
            found.append(confirm(question, fit.candidate(size), tracer))
    return searching._best([candidate for candidate in found if candidate.total <= question.room])


def test_figures_from_small_traces_are_those_of_the_whole(tracer: Tracer) -> None:
    """Of two and three layers and micro-batches of 2 and 4, for four layers and eight samples."""
    asked = question(BATCHES)
    fit = Fit.of(asked, {}, micro_batches(asked), tracer)
    traced = confirm(asked, fit.candidate(8), tracer)
    assert traced.trace is not None
    assert fit.at(8, "by_phase", "passes") == pytest.approx(traced.trace["by_phase"]["passes"], rel=0.02)
    assert fit.at(8, "costs", "last", "flops", "float32") == pytest.approx(
        traced.trace["costs"]["last"]["flops"]["float32"], rel=1e-3
    )


@pytest.mark.parametrize(
    "spare",
    [
        pytest.param(4 << 30, marks=pytest.mark.hours),
        pytest.param(400 << 20, marks=pytest.mark.hours),
        pytest.param(60 << 20, marks=pytest.mark.hours),
    ],
)
def test_the_winner_is_that_of_an_exhaustive_search(tracer: Tracer, spare: int) -> None:
    asked = question(BATCHES | {CHECKPOINTING}, spare)
    best, found = exhaustive(asked, tracer), search(asked, tracer)
    assert found.fits == (best is not None)
    if best is not None:
        assert found.winner.changes == best.changes


@pytest.mark.hours
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spare", [20 << 20, 60 << 20, 120 << 20, 400 << 20, 4 << 30])
def test_the_winner_is_that_of_an_exhaustive_search_over_everything(
    tracer: Tracer, ranks: int, precision: str, spare: int
) -> None:
    keys = BATCHES | {CHECKPOINTING, ENGINE, STAGE}
    asked = question(keys, spare, ranks, precision=precision)
    best, found = exhaustive(asked, tracer), search(asked, tracer)
    assert found.fits == (best is not None)
    if best is not None:
        assert found.winner.seconds <= (1 + searching.TIE) * best.seconds


def test_what_the_user_fixed_stays(tracer: Tracer) -> None:
    asked = question(frozenset({CHECKPOINTING}), engine="torch")
    found = search(asked, tracer)
    assert {tuple(candidate.changes) for candidate in found.candidates} == {(CHECKPOINTING,)}


def test_less_memory_never_makes_a_plan_faster(tracer: Tracer) -> None:
    seconds = []
    for spare in (4 << 30, 400 << 20, 60 << 20):
        found = search(question(BATCHES | {CHECKPOINTING}, spare), tracer)
        if found.fits:
            seconds.append(found.winner.seconds)
    assert len(seconds) > 1
    assert seconds == sorted(seconds)


@pytest.mark.long
def test_a_job_that_cannot_fit_is_told_what_would(tracer: Tracer) -> None:
    asked = question(frozenset(), spare=400 << 20, engine="torch")
    found = search(asked, tracer)
    assert not found.fits
    ways = report.ways_out(asked, tracer)
    assert 1 <= len(ways) <= 3
    assert all(way["memory_bytes"] <= asked.room for way in ways)
    assert list(ways[0]["changes"]) == [MICRO_BATCH], "the smallest change comes first"
    plan = report.to_dict(asked, found, ways)
    assert not plan["fits"]
    assert plan["peak_reserved_bytes"] >= plan["peak_allocated_bytes"]
    assert "what would fit:" in report.text(plan)


def test_a_plan_adds_up_and_says_why(tracer: Tracer) -> None:
    asked = question(BATCHES | {CHECKPOINTING}, spare=400 << 20)
    found = search(asked, tracer)
    plan = report.to_dict(asked, found)
    outside = overheads.outside(asked.circumstances)
    assert sum(plan["breakdown"].values()) == plan["peak_reserved_bytes"] + outside
    assert {choice["key"] for choice in plan["chosen"]} == asked.open
    assert all(choice["why"] for choice in plan["chosen"])
    assert plan["candidates"][0]["step_seconds"] <= plan["candidates"][-1]["step_seconds"]
    assert "candidates, the fastest first:" in report.text(plan)


def test_strategies_come_simplest_first_and_none_does_what_a_simpler_one_does() -> None:
    found = list(structures(question(frozenset({ENGINE, STAGE}))))
    assert found[0] == {ENGINE: "torch", STAGE: 0}
    assert {ENGINE: "deepspeed", STAGE: 0} not in found
    alone = list(structures(question(frozenset({ENGINE, STAGE}), ranks=1)))
    assert alone == [{ENGINE: "torch", STAGE: 0}], "one rank has nothing to shard"


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ({}, set()),
        ({"strategy": {"engine": "auto"}}, {ENGINE}),
        ({"strategy": {"activation_checkpointing": "auto"}}, {CHECKPOINTING}),
        ({"strategy": {"activation_checkpointing": {"mode": "auto"}}}, {CHECKPOINTING}),
        ({"strategy": {"zero": {"stage": "auto"}}}, {STAGE}),
        ({"training": {"micro_batch_size": "auto"}}, {MICRO_BATCH, ACCUMULATION}),
        ({"training": {"micro_batch_size": "auto", "gradient_accumulation_steps": 4}}, {MICRO_BATCH}),
        ({"strategy": "auto", "training": [1]}, set()),
    ],
)
def test_the_keys_that_say_auto(value: dict[str, Any], keys: set[str]) -> None:
    shorthands = {("strategy", "activation_checkpointing"): "mode"}
    found = auto.opened(value, shorthands)
    assert auto.open_keys(found, value) == keys


def test_a_job_file_with_auto_is_read_with_the_simplest_in_its_place(tmp_path: Path) -> None:
    from memlaunch.launcher.plan import memory

    path = Path(__file__).parents[1] / "examples" / "reviews" / "job.json"
    sets = ["strategy.zero.stage=auto", "strategy.activation_checkpointing=auto"]
    _, resolved, keys = memory.read(path, sets)
    assert keys == {STAGE, CHECKPOINTING}
    assert resolved.job.strategy.zero.stage == 0
    assert resolved.job.strategy.activation_checkpointing.mode == "none"
