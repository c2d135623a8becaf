"""The planner chooses the fastest way to run a job that fits, and leaves alone what the user fixed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def exhaustive(question: Question, tracer: Any) -> Candidate | None:
    """The best of all candidates, each traced as a whole."""
    every = [
        {**structure, MICRO_BATCH: size}
        for structure in structures(question)
        for size in micro_batches(question)
    ]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda changes: confirm(question, changes, tracer), every))
    return searching._best([candidate for candidate in found if candidate.total <= question.room])


def test_figures_from_small_traces_are_those_of_the_whole(cuda: Tracer) -> None:
    """Of two and three layers and micro-batches of 2 and 4, for four layers and eight samples."""
    asked = question(BATCHES)
    fit = Fit.of(asked, {}, micro_batches(asked), cuda)
    traced = confirm(asked, fit.candidate(8).changes, cuda)
    assert traced.trace is not None
    assert fit.candidate(8).allocated == pytest.approx(traced.allocated, rel=0.01)
    assert fit.candidate(8).seconds == pytest.approx(traced.seconds, rel=0.01)
    assert fit.at(8, "costs", "last", "flops", "float32") == pytest.approx(
        traced.trace["costs"]["last"]["flops"]["float32"], rel=1e-3
    )


class Formulas:
    """Traces that are formulas: whatever shards more needs less, whatever recomputes takes longer.

    Attributes:
        states: bytes of a layer's parameters and states, before they are sharded.
        activations: bytes of a layer and sample; recomputed: share that is computed again; both by mode.
        speeds, sends: kernels of a layer, and bytes that a micro-batch sends, by engine and stage.
    """

    def __init__(self, draw: st.DrawFn) -> None:
        self.states = draw(st.integers(1, 400)) << 20
        self.activations = sorted(draw(st.lists(st.integers(0, 64 << 20), min_size=3, max_size=3)))[::-1]
        self.recomputed = sorted(draw(st.lists(st.floats(0, 0.5), min_size=2, max_size=2)))
        self.flops = draw(st.integers(1 << 30, 1 << 42))
        ways = [(engine, stage) for engine in ("torch", "deepspeed") for stage in range(4)]
        self.speeds = {way: draw(st.integers(1, 400)) for way in ways}
        self.sends = {way: draw(st.integers(0, 1 << 30)) for way in ways}
        self.asked = 0

    def steps(self, requests: Sequence[Any]) -> list[list[dict[str, Any]]]:
        return [
            [self.trace(job, {**shape, "samples": size}, layers, None) for size in sizes]
            for job, shape, layers, sizes in requests
        ]

    def trace(self, job: Any, shape: Any, layers: int | None, capacity: int | None) -> dict[str, Any]:
        self.asked += 1
        strategy, samples, depth = job["strategy"], shape["samples"], layers or 8
        stage, ranks = strategy["zero"]["stage"], job["cluster"]["gpus_per_node"]
        mode = ("none", "selective", "full").index(strategy["activation_checkpointing"]["mode"])
        sharded = self.states * (4 - stage + stage / ranks) / 4
        peak = int(depth * (sharded + samples * self.activations[mode]) + samples * (1 << 20))
        once = {
            "flops": {"float32": int((1 + [0.0, *self.recomputed][mode]) * depth * samples * self.flops)},
            "bytes_moved": samples << 24,
            "kernels": depth * (self.speeds[strategy["engine"], stage] + mode),
            "collectives": {
                "all_reduce": {"calls": 1, "bytes": depth * self.sends[strategy["engine"], stage]}
            },
        }
        inner = once if shape["micro_batches"] > 1 else {**once, "kernels": 0}
        step = {"flops": {}, "bytes_moved": int(sharded), "kernels": 1, "collectives": {}}
        return {
            "peak_bytes": peak,
            "by_phase": {"forward": peak, "step": int(depth * sharded)},
            "offloaded_bytes": 0,
            "costs": {"inner": inner, "last": once, "step": step},
            "allocator": {"peak_reserved": int(1.03 * peak), "out_of_memory": False},
        }


@given(st.composite(Formulas)(), st.integers(28, 36), st.sampled_from([1, 4]))
@settings(max_examples=20, deadline=None)
def test_what_is_passed_over_would_not_have_won(formulas: Any, memory: int, ranks: int) -> None:
    """Of all strategies and micro-batches, whatever the engines cost."""
    asked = question(BATCHES | {CHECKPOINTING, ENGINE, STAGE}, 1 << memory, ranks)
    asked = replace(asked, shape={**asked.shape, "layers": 8})
    best, found = exhaustive(asked, formulas), search(asked, formulas)
    assert found.fits == (best is not None)
    if best is not None:
        assert found.winner.changes == best.changes


@pytest.mark.hours
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spare", [20 << 20, 60 << 20, 120 << 20, 400 << 20, 4 << 30])
def test_the_winner_is_that_of_an_exhaustive_search(
    cuda: Tracer, ranks: int, precision: str, spare: int
) -> None:
    """On real traces; the whole ones do not depend on the memory, so they are made once."""
    keys = BATCHES | {CHECKPOINTING, ENGINE, STAGE}
    asked = question(keys, spare, ranks, precision=precision)
    best, found = exhaustive(asked, cuda), search(asked, cuda)
    assert found.fits == (best is not None)
    if best is not None:
        assert found.winner.changes == best.changes


def test_what_the_user_fixed_stays(cuda: Tracer) -> None:
    asked = question(frozenset({CHECKPOINTING}), engine="torch")
    found = search(asked, cuda)
    assert {tuple(candidate.changes) for candidate in found.candidates} == {(CHECKPOINTING,)}


def test_less_memory_never_makes_a_plan_faster(cuda: Tracer) -> None:
    seconds = []
    for spare in (4 << 30, 400 << 20, 60 << 20):
        found = search(question(BATCHES | {CHECKPOINTING}, spare), cuda)
        if found.fits:
            seconds.append(found.winner.seconds)
    assert len(seconds) > 1
    assert seconds == sorted(seconds)


@pytest.mark.long
def test_a_job_that_cannot_fit_is_told_what_would(cuda: Tracer) -> None:
    asked = question(frozenset(), spare=400 << 20, engine="torch")
    found = search(asked, cuda)
    assert not found.fits
    ways = report.ways_out(asked, cuda)
    assert 1 <= len(ways) <= 3
    assert all(way["memory_bytes"] <= asked.room for way in ways)
    assert list(ways[0]["changes"]) == [MICRO_BATCH], "the smallest change comes first"
    plan = report.to_dict(asked, found, ways)
    assert not plan["fits"]
    assert plan["peak_reserved_bytes"] >= plan["peak_allocated_bytes"]
    assert "what would fit:" in report.text(plan)


def test_a_plan_adds_up_and_says_why(cuda: Tracer) -> None:
    asked = question(BATCHES | {CHECKPOINTING}, spare=400 << 20)
    found = search(asked, cuda)
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


def test_a_bucket_that_the_job_fixes_bounds_the_micro_batch() -> None:
    """A micro-step of all ranks is dealt from a bucket of like lengths; a larger one would mix them."""
    asked = question(BATCHES)
    assert micro_batches(asked) == [1, 2, 4, 8, 16, 32, 64]
    assert micro_batches(replace(asked, bucket=32)) == [1, 2, 4, 8, 16]
    assert micro_batches(replace(asked, bucket=1)) == [1]


@pytest.mark.parametrize(("spare", "fits"), [(1, True), (-1, False)])
def test_what_is_offloaded_has_to_fit_the_memory_of_a_machine(cuda: Tracer, spare: int, fits: bool) -> None:
    zero = {"stage": 2, "offload_optimizer": "cpu"}
    asked = question(BATCHES, engine="torch", zero=zero)
    found = search(asked, cuda).winner
    assert found.host > 0
    limited = replace(asked, host=found.host * asked.machines.per_node + spare)
    assert search(limited, cuda).fits == fits
