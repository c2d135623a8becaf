"""Two optimizer steps of a job on made-up batches, by the model, techniques and engine that a run uses.

The state of the optimizer comes with the first step, so memory is at its highest in the second.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from memlaunch.launcher.plan.trace import own
from memlaunch.launcher.plan.trace.shape import Shape as Shape
from memlaunch.launcher.training import loop, tokens
from memlaunch.launcher.training.batches import MicroBatch
from memlaunch.launcher.training.data import load
from memlaunch.launcher.training.engine import Engine, Step
from memlaunch.launcher.training.model import build
from memlaunch.launcher.training.tasks import CLASSIFIES, TASKS, Task
from memlaunch.launcher.training.world import World
from memlaunch.launcher.translate import deepspeed
from memlaunch.strategies import TECHNIQUES, padding

if TYPE_CHECKING:
    from memlaunch.launcher.job import Job
    from memlaunch.launcher.resolve import ResolvedJob

STEPS = 2


def shape_of(resolved: "ResolvedJob") -> Shape:
    """The largest micro-batch that the job's own data makes, tokenised as a run would.

    Raises:
        JobMismatch: the data cannot be read.
    """
    job = resolved.job
    if job.model.entry is not None:
        return own.shape_of(resolved)
    data = load(resolved)
    batching = job.data.batching
    packed = batching.mode == "packed"
    longest = data.max_length if packed else data.train.longest[0]
    width = padding.padded_length(longest, job.data.padding, data.max_length)
    rows = resolved.batch.micro_batch_size
    if batching.max_tokens is not None:
        rows = max(1, batching.max_tokens // width)
    fields = ("input_ids", "position_ids") if packed else tuple(data.train.fields)
    classifies = job.model.task in CLASSIFIES
    names = tokens.label_names(data.train, job.model.num_labels) if classifies else None
    targets = data.train.longest[1]
    return Shape(
        samples=rows,
        tokens=width,
        micro_batches=min(2, resolved.batch.gradient_accumulation_steps),
        fields=fields,
        classes=None if names is None else len(names),
        pad_token=data.pad_token,
        packed=packed,
        padded=rows > 1 or width > longest,
        targets=targets,
    )


class Witness(Protocol):
    """Is told what a rehearsal is at."""

    def enter(self, phase: str, step: int) -> None:
        """``phase``: ``build``, ``batch``, ``forward``, ``backward``, ``step`` or ``rest``."""

    def built(self, model: nn.Module) -> None:
        """The model is there, and nothing else yet."""

    def started(self, engine: Engine) -> None:
        """The engine is there."""

    def stepped(self, engine: Engine, step: int) -> None:
        """An optimizer step is over."""


def rehearse(
    resolved: "ResolvedJob",
    shape: Shape,
    world: World,
    witness: Witness,
    changes: Mapping[str, Any] | None = None,
    sizes: Sequence[int] = (),
) -> None:
    """Run the job's own engine for two optimizer steps.

    Args:
        sizes: samples of the micro-batches of further steps, one each.
        changes: as for :func:`memlaunch.launcher.training.model.build`.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model.
    """
    job = resolved.job
    setup = resolved.setup(world.kind)
    witness.enter("build", -1)
    if job.model.entry is not None:
        assert not sizes, "its samples are drawn once"
        model, task, again = own.made(resolved, shape)
        make: Callable[[Shape], MicroBatch] = lambda each: again()  # noqa: E731
    else:
        model, task, make = _made(job, shape, changes)
    for technique in TECHNIQUES:
        technique.prepare_model(model, setup)
    witness.built(model)
    engine: Engine
    if setup.engine == "torch":
        from memlaunch.launcher.training import torch_engine

        engine = torch_engine.start(model, setup, world)
    else:
        from memlaunch.launcher.training.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(model, setup, world, deepspeed.config(resolved))
    witness.started(engine)
    model.train()

    def run() -> None:
        batch = make(shape)
        with engine.micro_step(last=True):
            engine.backward(loop._loss(engine, task, batch))

    witness.enter("rest", 0)
    engine.rehearse(run)  # what an engine does in its first steps only is behind it in the last one
    # The first step is there for the state that it leaves; one micro-batch does that.
    shapes = [replace(shape, micro_batches=1), shape, *(replace(shape, samples=size) for size in sizes)]
    for step, each in enumerate(shapes):
        witness.enter("batch", step)
        window = [make(each) for _ in range(each.micro_batches)]
        witness.enter("rest", step)
        watched: Any = _Watched(engine, witness, step)
        loop._optimizer_step(watched, task, window, setup.learning_rate, world)
        del window
        witness.stepped(engine, step)


def _made(
    job: "Job", shape: Shape, changes: Mapping[str, Any] | None
) -> tuple[nn.Module, Task, Callable[[Shape], MicroBatch]]:
    """The model of transformers, its task, and what makes a micro-batch."""
    names = [str(index) for index in range(shape.classes)] if shape.classes is not None else None
    model = build(job.model, names, shape.pad_token, job.training.seed, changes)
    model.config.use_cache = False
    fields = [name for name in shape.fields if name in inspect.signature(model.forward).parameters]
    vocabulary = int(getattr(model.config, "vocab_size", 2))
    return model, TASKS[job.model.task], lambda each: _batch(job.model.task, each, fields, vocabulary)


def _batch(task: str, shape: Shape, fields: list[str], vocabulary: int) -> MicroBatch:
    """A micro-batch of that shape, whose last token is padding where there is some."""
    size = shape.samples, shape.tokens
    inputs = {"input_ids": torch.randint(0, vocabulary, size)}
    inputs |= {name: torch.zeros(size, dtype=torch.int64) for name in fields if name not in inputs}
    if not shape.packed:
        mask = torch.ones(size, dtype=torch.int64)
        mask[-1, -1] = int(not shape.padded)
        inputs["attention_mask"] = mask
    if task == "sequence-classification":
        labels, count = torch.zeros(shape.samples, dtype=torch.int64), shape.samples
    elif task == "token-classification":
        labels, count = torch.zeros(size, dtype=torch.int64), shape.samples * shape.tokens
    elif task == "seq2seq-lm":
        labels = torch.randint(0, vocabulary, (shape.samples, shape.targets))
        inputs["decoder_input_ids"], count = labels.clone(), shape.samples * shape.targets
    else:
        labels, count = inputs["input_ids"].clone(), shape.samples * (shape.tokens - 1)
    padded = shape.samples * (shape.tokens + shape.targets)
    return MicroBatch(inputs, labels, count, shape.samples, padded, padded)


class _Watched:
    """An engine that tells a witness what it does."""

    def __init__(self, engine: Engine, witness: Witness, step: int) -> None:
        self.module = engine.module
        self._engine, self._witness, self._step = engine, witness, step

    @contextmanager
    def _around(self, inner: AbstractContextManager[None]) -> Iterator[None]:
        with inner:
            yield
        self._witness.enter("rest", self._step)

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        self._witness.enter("forward", self._step)
        return self._around(self._engine.micro_step(last))

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self._engine.forward(inputs)

    def backward(self, loss: Tensor) -> None:
        self._witness.enter("backward", self._step)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> Step:
        self._witness.enter("step", self._step)
        result = self._engine.step(learning_rate)
        self._witness.enter("rest", self._step)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
