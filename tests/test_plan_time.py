"""What a step is taken to take, the GPUs that are known, and the memory that no trace sees."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher.errors import UserError
from memlaunch.launcher.plan import gpus, overheads
from memlaunch.launcher.plan.overheads import OVERHEADS, Circumstances
from memlaunch.launcher.plan.time import (
    OF_BANDWIDTH,
    OF_FLOPS,
    OF_LINK,
    Machines,
    arithmetic_seconds,
    collective_seconds,
    step_seconds,
)

H100 = gpus.find("H100-80GB")


def costs(flops: float = 0, moved: float = 0, kernels: int = 1, **collectives: Any) -> dict[str, Any]:
    return {
        "flops": {"bfloat16": flops},
        "bytes_moved": moved,
        "kernels": kernels,
        "collectives": collectives,
    }


def step(last: dict[str, Any], inner: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"inner": inner or costs(kernels=0), "last": last, "step": costs(kernels=0)}


def test_arithmetic_and_traffic_take_what_the_gpu_needs_for_them() -> None:
    machines = Machines(H100, 1, 1)
    second = step(costs(flops=H100.flops["bfloat16"] * OF_FLOPS, moved=H100.memory_bandwidth * OF_BANDWIDTH))
    assert arithmetic_seconds(second, 1, machines) == pytest.approx(1)
    assert step_seconds(second, 1, machines) == pytest.approx(2)
    assert step_seconds(second, 5, machines) == pytest.approx(10)


def test_a_step_of_many_small_kernels_takes_their_launches() -> None:
    machines = Machines(H100, 1, 1)
    assert step_seconds(step(costs(kernels=10_000)), 1, machines) == pytest.approx(0.05)


def test_a_ring_sends_all_but_one_share_of_the_whole_and_an_all_reduce_twice() -> None:
    machines, size = Machines(H100, 1, 8), 8 << 30
    once = collective_seconds("all_gather", 0, size, machines)
    assert once == pytest.approx(7 / 8 * size / (OF_LINK * H100.link))
    assert collective_seconds("all_reduce", 0, size, machines) == pytest.approx(2 * once)
    assert collective_seconds("all_reduce", 9, size, Machines(H100, 1, 1)) == 0


@given(st.integers(1, 16), st.integers(1, 8), st.integers(0, 1 << 36))
def test_more_machines_are_never_faster_at_sending(nodes: int, per_node: int, size: int) -> None:
    seconds = [
        collective_seconds("all_reduce", 1, size, Machines(H100, n, per_node)) for n in (nodes, nodes + 1)
    ]
    assert seconds[0] <= seconds[1]


@given(
    st.floats(0, 1e15), st.floats(0, 1e12), st.integers(1, 10_000), st.integers(0, 1 << 34), st.integers(1, 9)
)
def test_a_step_takes_at_least_its_work_and_grows_with_everything(
    flops: float, moved: float, kernels: int, sent: int, accumulation: int
) -> None:
    machines = Machines(H100, 2, 8)
    alone = step(costs(flops, moved, kernels))
    sending = step(costs(flops, moved, kernels, all_reduce={"calls": 1, "bytes": sent}))
    seconds = step_seconds(sending, accumulation, machines)
    without = step_seconds(alone, accumulation, machines)
    assert seconds >= without >= arithmetic_seconds(alone, accumulation, machines)
    assert step_seconds(sending, accumulation + 1, machines) >= seconds
    assert step_seconds(sending, accumulation, machines, offloaded_bytes=sent) >= seconds


@pytest.mark.parametrize("name", ["H100-80GB", "h100", "NVIDIA H100 80GB HBM3", "h100_80gb"])
def test_a_gpu_is_found_however_it_is_written(name: str) -> None:
    assert gpus.find(name) is H100


def test_an_unknown_gpu_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError) as raised:
        gpus.find("A100-80G")
    assert raised.value.hint == "did you mean `A100-80GB`?"
    with pytest.raises(UserError, match="knows no GPU"):
        gpus.find("abacus")


@pytest.mark.parametrize("gpu", gpus.catalogue().values(), ids=lambda gpu: gpu.name)
def test_an_entry_of_the_catalogue_is_plausible(gpu: gpus.Gpu) -> None:
    """A driver leaves less than the name says, and not much less."""
    advertised = float(gpu.name.rsplit("-", 1)[1].removesuffix("GB"))
    gigabytes = gpu.memory_bytes / (1 << 30)
    assert 0.9 * advertised < gigabytes < 1.01 * advertised
    assert gpu.flops["float16"] >= gpu.flops["float32"] > 1e12
    assert gpu.memory_bandwidth > gpu.link >= gpu.network
    assert gpu.link >= gpu.pcie


def test_every_overhead_names_its_source() -> None:
    assert all(len(row.source) > 20 for row in OVERHEADS)
    one, many = Circumstances(9.0, 1, 1), Circumstances(9.0, 16, 2)
    assert overheads.outside(many) > overheads.outside(one) > 0
    assert overheads.reserved(one) == 2 * 32 * (1 << 20), "a workspace of cuBLAS for each of two threads"
