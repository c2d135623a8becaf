"""Two optimizer steps of a job on made-up batches, by the model, techniques and engine that a run uses.

The state of the optimizer comes with the first step, so memory is at its highest in the second.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from memlaunch.launcher.training import loop, tokens
from memlaunch.launcher.training.batches import MicroBatch
from memlaunch.launcher.training.data import load
from memlaunch.launcher.training.engine import Engine, Step
from memlaunch.launcher.training.model import build
from memlaunch.launcher.training.tasks import TASKS
from memlaunch.launcher.training.world import World
from memlaunch.launcher.translate import deepspeed
from memlaunch.strategies import TECHNIQUES, padding

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

STEPS = 2


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch of a rank, and what the model must know of the data.

    Attributes:
        samples, tokens: rows of the micro-batch, and tokens of each.
        micro_batches: of an optimizer step; those beyond the second find memory as the second does.
        fields: what a sample has beside its attention mask, such as ``input_ids``.
        classes: names of the classes, for a classification.
        pad_token: the id that batches are padded with.
        padded: whether it holds padding; without, a model may do without its attention mask.
        packed: whether rows are made of several samples, told apart by their positions.
    """

    samples: int
    tokens: int
    micro_batches: int
    fields: tuple[str, ...]
    classes: int | None
    pad_token: int
    padded: bool = True
    packed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shape":
        """From JSON."""
        return cls(**{**values, "fields": tuple(values["fields"])})


def shape_of(resolved: "ResolvedJob") -> Shape:
    """The largest micro-batch that the job's own data makes, tokenised as a run would.

    Raises:
        JobMismatch: the data cannot be read.
    """
    job, data = resolved.job, load(resolved)
    batching = job.data.batching
    packed = batching.mode == "packed"
    longest = data.max_length if packed else int(data.train.lengths.max())
    width = padding.padded_length(longest, job.data.padding, data.max_length)
    rows = resolved.batch.micro_batch_size
    if batching.max_tokens is not None:
        rows = max(1, batching.max_tokens // width)
    fields = ("input_ids", "position_ids") if packed else tuple(data.train.fields)
    names = tokens.label_names(data.train, job.model.num_labels) if data.train.codes is not None else None
    return Shape(
        samples=rows,
        tokens=width,
        micro_batches=min(2, resolved.batch.gradient_accumulation_steps),
        fields=fields,
        classes=None if names is None else len(names),
        pad_token=data.pad_token,
        packed=packed,
        padded=rows > 1 or width > longest,
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
) -> None:
    """Run the job's own engine for two optimizer steps.

    Args:
        changes: as for :func:`memlaunch.launcher.training.model.build`.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model.
    """
    job = resolved.job
    setup = resolved.setup(world.kind)
    task = TASKS[job.model.task]
    witness.enter("build", -1)
    names = [str(index) for index in range(shape.classes)] if shape.classes is not None else None
    model = build(job.model, names, shape.pad_token, job.training.seed, changes)
    model.config.use_cache = False
    fields = [name for name in shape.fields if name in inspect.signature(model.forward).parameters]
    for technique in TECHNIQUES:
        technique.prepare_model(model, setup)
    witness.built(model)
    engine: Engine
    if setup.engine == "torch":
        from memlaunch.launcher.training.torch_engine import TorchEngine

        engine = TorchEngine(model, setup, world)
    else:
        from memlaunch.launcher.training.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(model, setup, world, deepspeed.config(resolved))
    witness.started(engine)
    model.train()
    vocabulary = int(getattr(model.config, "vocab_size", 2))
    for step in range(STEPS):
        witness.enter("batch", step)
        # The first step is there for the state that it leaves; one micro-batch does that.
        micro_batches = shape.micro_batches if step == STEPS - 1 else 1
        window = [_batch(shape, fields, vocabulary) for _ in range(micro_batches)]
        witness.enter("rest", step)
        watched: Any = _Watched(engine, witness, step)
        loop._optimizer_step(watched, task, window, setup.learning_rate, world)
        del window
        witness.stepped(engine, step)


def _batch(shape: Shape, fields: list[str], vocabulary: int) -> MicroBatch:
    """A micro-batch of that shape, whose last token is padding where there is some."""
    size = shape.samples, shape.tokens
    inputs = {"input_ids": torch.randint(0, vocabulary, size)}
    inputs |= {name: torch.zeros(size, dtype=torch.int64) for name in fields if name not in inputs}
    if not shape.packed:
        mask = torch.ones(size, dtype=torch.int64)
        mask[-1, -1] = int(not shape.padded)
        inputs["attention_mask"] = mask
    if shape.classes is None:
        labels, count = inputs["input_ids"].clone(), shape.samples * (shape.tokens - 1)
    else:
        labels, count = torch.zeros(shape.samples, dtype=torch.int64), shape.samples
    return MicroBatch(inputs, labels, count, shape.samples, shape.samples * shape.tokens, labels.numel())


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
