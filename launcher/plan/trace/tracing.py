"""One job traced: its peak memory, where that comes from, and what a step costs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from memlaunch.launcher.plan import allocator
from memlaunch.launcher.plan.trace import cuda, fakes
from memlaunch.launcher.plan.trace.costs import Costs
from memlaunch.launcher.plan.trace.recorder import Recorder, peak
from memlaunch.launcher.plan.trace.rehearsal import STEPS, Shape, rehearse
from memlaunch.launcher.training import entries
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.model import build, parameter_count
from memlaunch.strategies import freezing, lora, optimizer

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.strategies.technique import Device

#: Entries of the list of what holds the memory at the peak.
HOLDERS = 12


def trace(
    resolved: "ResolvedJob",
    shape: Shape,
    device: "Device",
    layers: int | None = None,
    sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """Two optimizer steps on fake tensors, as rank 0 of the job's world; changes this process for good.

    Args:
        device: where the job would run.
        layers: so many in the place of the model's own number.
        sizes: samples of the micro-batches of further steps, from the shape's own upwards.

    The answer has ``peak_bytes``, ``states_bytes`` (what lives between steps), ``breakdown`` (category ->
    bytes at the peak), ``by_phase`` (phase -> its peak), ``layers`` (of the model; null where it does not
    say), ``moment`` (step, phase and operator of the peak), ``holders`` (the operators whose results hold
    most of it), ``offloaded_bytes`` (what offload keeps in host memory), ``parameters`` (all, trainable),
    ``costs`` (of ``inner`` micro-batches, of the ``last`` one of a step, and of the optimizer's ``step``,
    each as in :class:`Costs`), ``steps`` (``by_phase``, ``offloaded_bytes`` and ``costs`` of the shape, then
    those of each size as if it were the shape's), ``seconds`` that the trace took; for ``cuda`` and the whole
    model without further sizes also ``allocator`` and ``expandable_allocator``, the usage of the caching
    allocator without and with expandable segments, and the ``events`` that it comes from, packed.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model.
    """
    begun = time.perf_counter()
    setup = resolved.setup("cpu")
    fakes.prepare_libraries()
    if setup.engine == "deepspeed":
        fakes.prepare_deepspeed()
    elif setup.zero.stage:
        fakes.prepare_fsdp()
    through = {}
    if optimizer.uses_8bit(setup.optimizer):
        fakes.prepare_bitsandbytes()
        through = fakes.python_kernels() if device == "cpu" else {}
    if device == "cuda":
        cuda.choose_as_cuda()
    world = fakes.join(resolved.world_size)
    stand_ins = fakes.stand_ins(mask_is_whole=not shape.padded)
    workspace = cuda.workspaces() if device == "cuda" else fakes.workspaces()
    recorder = Recorder(stand_ins, through, workspace)
    witness = RecordingWitness(recorder, shape, device)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        stack.enter_context(recorder.following_resizes())
        changes = {} if layers is None else {"num_hidden_layers": layers}
        rehearse(resolved, shape, world, witness, changes, sizes)
    hosted = frozenset(witness.built_on_host | witness.offloaded)
    steps = [
        {
            "by_phase": peak(recorder, hosted, end).by_phase,
            "offloaded_bytes": _most(recorder, witness.offloaded, end),
            "costs": {part: counted.to_dict() for part, counted in costs.items()},
        }
        for end, costs in zip(witness.ends, witness.costs, strict=True)
    ]
    highest = peak(recorder, hosted, witness.ends[0])
    made = recorder.allocations[recorder.events[highest.at][0]]
    answer: dict[str, Any] = {
        "peak_bytes": highest.bytes,
        "states_bytes": witness.states,
        "breakdown": highest.breakdown,
        "by_phase": highest.by_phase,
        "layers": witness.layers,
        "moment": {"step": made.step, "phase": made.phase, "op": made.op},
        "holders": [
            {"op": op, "category": category, "storages": storages, "bytes": size}
            for (op, category), (storages, size) in list(highest.holders.items())[:HOLDERS]
        ],
        "offloaded_bytes": steps[0]["offloaded_bytes"],
        "parameters": witness.parameters,
        "costs": steps[0]["costs"],
        "steps": steps,
    }
    if device == "cuda" and layers is None and not sizes:
        events = [event for event in recorder.events if event[0] not in hosted]
        for key, expandable in (("allocator", False), ("expandable_allocator", True)):
            answer[key] = asdict(allocator.simulate(events, allocator.Settings(expandable)))
        answer["events"] = allocator.packed(events)
    return {**answer, "seconds": round(time.perf_counter() - begun, 3)}


def facts(resolved: "ResolvedJob", shape: Shape) -> dict[str, Any]:
    """``parameters`` (all, trainable), in elements, and ``layers`` of the job's model; reads no weights.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model.
    """
    names = [str(index) for index in range(shape.classes)] if shape.classes is not None else None
    model: nn.Module
    if resolved.job.model.entry is not None:
        model = entries.build(resolved.job.model, seed=0).model
    else:
        with torch.device("meta"):
            model = build(resolved.job.model, names, shape.pad_token, seed=0, changes={})
    for technique in (freezing.TECHNIQUE, lora.TECHNIQUE):
        technique.prepare_model(model, resolved.setup("cpu"))
    return {"parameters": parameter_count(model), "layers": _layers(model)}


def _layers(model: nn.Module) -> int | None:
    layers: int | None = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return layers


class RecordingWitness:
    """Tells a recorder what storages are for.

    Attributes:
        states: bytes of the device that are alive after the first optimizer step.
        parameters: (all, trainable), in elements.
        layers: of the model.
        built_on_host: numbers of the storages that came and went in host memory before the engine was there.
        offloaded: of those that offload keeps in host memory.
        costs: of each step but the first, by part.
        ends: the number of events before the end of each of them.
    """

    def __init__(self, recorder: Recorder, shape: Shape, device: "Device") -> None:
        self.states = 0
        self.parameters = (0, 0)
        self.layers: int | None = None
        self.built_on_host: set[int] = set()
        self.offloaded: set[int] = set()
        self.costs: list[dict[str, Costs]] = []
        self.ends: list[int] = []
        self._recorder, self._shape, self._device = recorder, shape, device
        self._micro_batches = 0
        self._model: nn.Module | None = None
        self._engine: Engine | None = None

    def enter(self, phase: str, step: int) -> None:
        self._recorder.phase, self._recorder.step = phase, step
        if phase == "step" and self._model is not None:
            self._recorder.file((p.grad for p in self._model.parameters()), "gradients")
            self._note_offloaded()
        if phase == "batch" and step >= STEPS - 1:
            self.costs.append({part: Costs() for part in ("inner", "last", "step")})
            self._micro_batches = 0
        if step >= STEPS - 1:
            self._micro_batches += phase == "forward"
            part = "last" if self._micro_batches == self._shape.micro_batches else "inner"
            parts = {"forward": part, "backward": part, "step": "step"}
            self._recorder.observer = self.costs[-1].get(parts.get(phase, ""))

    def built(self, model: nn.Module) -> None:
        self._model = model
        self._recorder.file([*model.parameters(), *model.buffers()], "parameters")
        every = list(model.parameters())
        trained = [p for p in every if p.requires_grad]
        self.parameters = sum(p.numel() for p in every), sum(p.numel() for p in trained)
        self.layers = _layers(model)
        self._built = set(range(len(self._recorder.allocations)))
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda grown: self._recorder.file([grown.grad], "gradients")
            )

    def started(self, engine: Engine) -> None:
        fakes.prepare_ddp(engine)
        self._recorder.file(_parameters(engine.module), "parameters")
        self._engine = engine
        if self._device == "cuda":
            # A model is built on the host. What of it is still there has moved, the rest never did.
            self.built_on_host = self._built - self._recorder.alive()

    def stepped(self, engine: Engine, step: int) -> None:
        used = base_optimizer(engine)
        self._recorder.file(_state(used), "optimizer_state")
        self._recorder.file((p for group in used.param_groups for p in group["params"]), "optimizer_state")
        self._note_offloaded()
        if step == 0:
            self.states = self._recorder.live_without(self.offloaded)
        else:
            self.ends.append(len(self._recorder.events))

    def _note_offloaded(self) -> None:
        if self._device == "cuda" and self._engine is not None:
            numbers = map(self._recorder.number, offloaded(self._engine))
            self.offloaded |= {number for number in numbers if number is not None}


def offloaded(engine: Engine) -> Iterator[Any]:
    """The tensors that an engine keeps in host memory, as its offload is set.

    FSDP2: the shards, their gradients and their state. DeepSpeed: the masters, their gradients and their
    state; the gradients of the passes; at stage 3 with its parameters, the shards; by the names that
    deepspeed/runtime/zero/stage_1_and_2.py and stage3.py have for them.
    """
    facts = engine.facts()
    if facts.offload_optimizer == facts.offload_parameters == "none":
        return
    used = base_optimizer(engine)
    deep = getattr(engine, "_engine", None)
    if deep is None:
        yield from _state(used)
        yield from engine.module.parameters()
        yield from (parameter.grad for parameter in engine.module.parameters())
        return
    zero = deep.optimizer
    if facts.offload_optimizer != "none":
        yield from _state(used)
        for group in used.param_groups:
            for master in group["params"]:
                yield from (master, master.grad)
        for name in ("accumulated_grads_in_cpu", "averaged_gradients", "temp_grad_buffer_for_cpu_offload"):
            yield from tree_leaves(getattr(zero, name, None))
        yield getattr(zero, "grad_partitions_flat_buffer", None)
        yield from getattr(zero, "fp32_partitioned_groups_flat", ())
    if facts.offload_parameters != "none":
        yield from (getattr(p, "ds_tensor", None) for p in engine.module.parameters())
        yield from getattr(zero, "param_groups_fp16_flat_cpu_memory", ())


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that does the arithmetic, below what an engine wraps around it."""
    found = getattr(engine, "_base", None) or getattr(engine, "_optimizer", None)
    assert isinstance(found, torch.optim.Optimizer)
    return found


def _state(used: torch.optim.Optimizer) -> Iterator[Any]:
    for state in used.state.values():
        yield from state.values()


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters():
        yield parameter
        yield from (shard for shard in [getattr(parameter, "ds_tensor", None)] if shard is not None)


def _most(recorder: Recorder, hosted: set[int], end: int) -> int:
    """The highest total of some storages in the first ``end`` events."""
    live = most = 0
    for number, size in recorder.events[:end] if hosted else ():
        if number in hosted:
            live += size
            most = max(most, live)
    return most
