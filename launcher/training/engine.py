"""What the loop asks of an engine; the loop does not know which one it has."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from memlaunch.strategies.technique import Facts


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    ``grad_norm`` is the norm over all ranks before clipping, None where it is not finite; ``loss_scale`` the
    scale that the step's gradients were computed with; ``skipped`` whether they overflowed and the weights
    stayed.
    """

    grad_norm: float | None
    loss_scale: float | None
    skipped: bool


@dataclass(frozen=True)
class Piece:
    """A run of elements of a parameter, in its flattened form, and where they stand in a block.

    Attributes:
        name: of the parameter.
        start: its first element, counted in the parameter.
        length: elements.
        at: its first element, counted in the flattened block.
    """

    name: str
    start: int
    length: int
    at: int


@dataclass(frozen=True)
class Block:
    """One live tensor of weights in this rank, with its optimizer state.

    That is a parameter, or the partition that ZeRO makes of many. What lies in none of ``pieces`` is padding.

    Attributes:
        weight: fp32, or what a frozen parameter is held in; filling it in place changes the model, once the
            engine has been told by :meth:`Engine.refresh`.
        state: the optimizer's own mapping for ``weight``, empty before the first step; None where frozen.
        replicated: whether every rank has the same.
    """

    pieces: tuple[Piece, ...]
    weight: Tensor
    state: dict[str, Any] | None
    replicated: bool


class Engine(Protocol):
    """A model, its optimizer, and how the ranks share the work."""

    module: nn.Module

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; ``last`` of its window or not."""

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The model's outputs."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar that engines average over the ranks."""

    def step(self, learning_rate: float) -> Step:
        """Clip, update the weights and clear the gradients.

        Raises:
            ScaleAtMinimum: the gradients overflow at the smallest loss scale.
        """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole, in host memory; trainable ones from their fp32 masters.

        Every rank must run it to its end; tied parameters come once for each name.
        """

    def facts(self) -> Facts:
        """What the engine really holds, for the techniques to check after the first step."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole; a tied parameter under its first name only."""

    def blocks(self) -> Iterator[Block]:
        """All weights and optimizer state of this rank, in the same order whenever it is asked."""

    def refresh(self) -> None:
        """Bring the weights that were filled into the blocks to where the model computes with them.

        Every rank must call it.
        """

    def rehearse(self, run: Callable[[], None]) -> None:
        """Before the first step of a resumed run: do what the engine does behind the first steps of any run.

        It is called once for each optimizer step that is made already, but twice at most. ``run`` does a
        forward and a backward pass, whose gradients must be dropped. Every rank must call it.
        """

    def loss_scale(self) -> dict[str, float] | None:
        """Where a dynamic loss scale stands, as :meth:`LossScale.state` tells it; None without one."""

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        """Put a dynamic loss scale where :meth:`loss_scale` found it."""
