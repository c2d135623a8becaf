"""What a technique is: its conflicts, its part of the DeepSpeed config, its work on the model, its check."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from memlaunch.strategies.checkpointing import CheckpointingSettings
    from memlaunch.strategies.lora import LoraSettings
    from memlaunch.strategies.optimizer import OptimizerSettings
    from memlaunch.strategies.precision import PrecisionSettings
    from memlaunch.strategies.sharding import ZeroSettings

Engine = Literal["torch", "deepspeed"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the techniques of one run may know about it: every choice made, nothing left to default.

    ``device`` is what the job asks for; in a rank it is the device found there, never ``auto``.
    """

    engine: Engine
    device: Device
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float | None
    zero: "ZeroSettings"
    precision: "PrecisionSettings"
    activation_checkpointing: "CheckpointingSettings"
    optimizer: "OptimizerSettings"
    freeze: tuple[str, ...] = ()
    lora: "LoraSettings | None" = None


@dataclass(frozen=True)
class Conflict:
    """Keys of a job that cannot stand together.

    ``key`` is the dotted key to point at, ``others`` the keys it disagrees with.
    """

    key: str
    message: str
    hint: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the engine of one rank really holds after the first optimizer step.

    ``states`` has one entry a tensor of optimizer state: (the bits its parameter group was given, its
    number of elements, its dtype as ``"uint8"``).
    """

    gradient_accumulation_steps: int
    zero_stage: int
    max_grad_norm: float | None
    dynamic_loss_scale: bool | None
    loss_scale: float | None
    offload_optimizer: str
    offload_parameters: str
    trainable: Mapping[str, bool]
    parameter_dtypes: Mapping[str, str]
    states: tuple[tuple[int, int, str], ...]


class NotApplicable(ValueError):
    """A technique cannot do what the job asks of this model: a pattern that matches nothing, no blocks.

    Attributes:
        key: the dotted key of the job file that asks for it.
        hint: what to do about it.
    """

    def __init__(self, key: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


def _no_conflicts(setup: Setup) -> Iterable[Conflict]:
    return ()


def _no_config(setup: Setup) -> Mapping[str, Any]:
    return {}


def _leave_model(model: "torch.nn.Module", setup: Setup) -> None:
    return None


def _nothing_to_verify(setup: Setup, facts: Facts) -> Iterable[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One technique, in the phases in which it takes part.

    Attributes:
        conflicts: setup -> what in the job it cannot work with; needs neither model nor torch.
        deepspeed_config: setup -> its part of ``ds_config.json``; needs neither model nor torch.
        prepare_model: changes the model in place, before parameters are grouped and the engine starts;
            raises :class:`NotApplicable` where the model does not have what the job names.
        verify: (setup, facts) -> one sentence for each thing asked for that did not take.
    """

    name: str
    conflicts: Callable[[Setup], Iterable[Conflict]] = field(default=_no_conflicts)
    deepspeed_config: Callable[[Setup], Mapping[str, Any]] = field(default=_no_config)
    prepare_model: Callable[["torch.nn.Module", Setup], None] = field(default=_leave_model)
    verify: Callable[[Setup, Facts], Iterable[str]] = field(default=_nothing_to_verify)
