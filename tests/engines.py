"""An engine over a tiny BERT, inside a rank, for tests that look at one technique."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from memlaunch.launcher.training.batches import MicroBatch
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.loop import _optimizer_step
from memlaunch.launcher.training.tasks import TASKS
from memlaunch.launcher.training.world import World
from memlaunch.launcher.translate.deepspeed import technique_config
from memlaunch.strategies import TECHNIQUES
from memlaunch.strategies.technique import Setup
from tests import setups

TASK = TASKS["sequence-classification"]

#: (engine, ZeRO stage) of every way to train.
ENGINES: list[tuple[Any, int]] = [
    ("torch", 0),
    ("torch", 2),
    ("torch", 3),
    ("deepspeed", 0),
    ("deepspeed", 1),
    ("deepspeed", 2),
    ("deepspeed", 3),
]


class Strategy(NamedTuple):
    """The strategy section of a job, as far as a test needs it."""

    engine: Any
    stage: int
    precision: Any = "fp32"
    checkpointing: Any = "none"
    optimizer: Any = "adamw"
    freeze: tuple[str, ...] = ()
    zero: Mapping[str, Any] = {}


def setup_of(strategy: Strategy, world: World) -> Setup:
    """Windows of two micro-batches of four samples over all ranks."""
    return setups.setup(
        engine=strategy.engine,
        world_size=world.size,
        micro_batch_size=4 // world.size,
        gradient_accumulation_steps=2,
        zero={"stage": strategy.stage, **strategy.zero},
        precision=strategy.precision,
        activation_checkpointing=strategy.checkpointing,
        optimizer=strategy.optimizer,
        freeze=strategy.freeze,
    )


def bert() -> transformers.BertForSequenceClassification:
    """Three layers of 64, no dropout; always the same weights."""
    return setups.bert(
        vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128
    )


def start(setup: Setup, world: World, model: torch.nn.Module | None = None) -> Engine:
    """An engine over :func:`bert`, prepared as a run prepares its model."""
    from memlaunch.launcher.training import torch_engine
    from memlaunch.launcher.training.deepspeed_engine import DeepSpeedEngine

    model = model or bert()
    for technique in TECHNIQUES:
        technique.prepare_model(model, setup)
    if setup.engine == "torch":
        return torch_engine.start(model, setup, world)
    return DeepSpeedEngine(model, setup, world, technique_config(setup))


def window(step: int, world: World, micro_batches: int = 2) -> list[MicroBatch]:
    """This rank's share of global batch ``step``: eight samples of twelve tokens."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 500, (8, 12), generator=generator)
    labels = torch.randint(0, 2, (8,), generator=generator)
    batches = []
    for index in range(micro_batches):
        mine = slice(index * 4 + world.rank, index * 4 + 4, world.size)
        inputs = {"input_ids": ids[mine], "attention_mask": torch.ones_like(ids[mine])}
        rows = len(labels[mine])
        batches.append(MicroBatch(inputs, labels[mine], rows, rows, rows * 12, rows * 12))
    return batches


def step(engine: Engine, number: int, world: World, learning_rate: float = 1e-3) -> dict[str, Any]:
    """One optimizer step as the loop does it; the line it would record."""
    return _optimizer_step(engine, TASK, window(number, world), learning_rate, world).line


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter, whole; all ranks must ask."""
    return {name: tensor.clone() for name, tensor in engine.weights()}


def distance(
    weights: Mapping[str, Tensor], others: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> float:
    """How far two trainings from ``start`` came out apart, relative to how far the second one went."""
    apart = sum(float((weights[name] - others[name]).square().sum()) for name in start)
    went = sum(float((others[name] - start[name]).square().sum()) for name in start)
    return (apart / went) ** 0.5


def numpy(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """For the way from a rank to the test."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def claim_fp16() -> None:
    """Let DeepSpeed train in fp16 on a CPU, which it refuses by itself; nowhere but in tests."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # type: ignore[method-assign]


__all__: Sequence[str] = ["ENGINES", "Strategy", "bert", "setup_of", "start", "step", "weights", "window"]
