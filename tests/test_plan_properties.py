"""What must hold of any job's memory, in bytes that the caching allocator hands out; on real traces."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlaunch.launcher.plan.traces import Tracer
from tests.test_plan_trace import job, shape

#: A trace is made once, whichever examples need it.
few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Traces:
    """Traces of small jobs, as CUDA would run them."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.of = functools.cache(self._of)

    def _of(
        self,
        samples: int,
        tokens: int,
        accumulation: int = 1,
        ranks: int = 1,
        stage: int = 0,
        mode: str = "none",
    ) -> dict[str, Any]:
        engine: dict[str, Any] = (
            {"engine": "deepspeed", "zero": {"stage": stage, "bucket_size": 1000}} if stage else {}
        )
        if stage == 3:  # else the tensors of so small a model are all small enough to stay whole
            engine["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        one = job(ranks=ranks, accumulation=accumulation, activation_checkpointing=mode, **engine)
        return self._tracer.trace(one, shape(one, samples, tokens))


@pytest.fixture(scope="module")
def traces() -> Iterator[Traces]:
    with Tracer("cuda", processes=1) as tracer:
        yield Traces(tracer)


def allocated(trace: dict[str, Any]) -> int:
    peak: int = trace["allocator"]["peak_allocated"]
    return peak


@few
@given(size=st.sampled_from([(8, 32), (16, 64)]))
def test_more_checkpointing_never_raises_what_a_step_adds(traces: Traces, size: tuple[int, int]) -> None:
    """Beyond the states, which are the same."""
    found = [traces.of(*size, mode=mode) for mode in ("none", "selective", "full")]
    assert len({trace["states_bytes"] for trace in found}) == 1
    peaks = [allocated(trace) for trace in found]
    assert peaks == sorted(peaks, reverse=True)


@few
@given(ranks=st.sampled_from([2, 8]))
def test_a_higher_stage_never_raises_the_sharded_states(traces: Traces, ranks: int) -> None:
    states = [traces.of(2, 16, ranks=ranks, stage=stage)["states_bytes"] for stage in (1, 2, 3)]
    # On two ranks the shards of gradients that stage 3 holds make up for the parameters that it does not, and
    # it pads every shard.
    padding = 0.002
    assert all(higher <= lower * (1 + padding) for lower, higher in itertools.pairwise(states))


@few
@given(ranks=st.sampled_from([2, 8]), stage=st.sampled_from([1, 2, 3]))
def test_more_ranks_never_raise_the_sharded_states(traces: Traces, ranks: int, stage: int) -> None:
    fewer, more = (traces.of(2, 16, ranks=count, stage=stage)["states_bytes"] for count in (2, ranks))
    assert more <= fewer


@few
@given(
    samples=st.lists(st.sampled_from([1, 2, 8]), min_size=2, max_size=2, unique=True),
    accumulation=st.sampled_from([1, 2]),
)
def test_a_smaller_micro_batch_never_raises_the_peak(
    traces: Traces, samples: list[int], accumulation: int
) -> None:
    smaller, larger = (allocated(traces.of(count, 32, accumulation)) for count in sorted(samples))
    assert smaller <= larger
