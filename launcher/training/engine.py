"""What the loop asks of an engine; the loop does not know which one it has."""

from collections.abc import Iterator
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
        """Clip, update the weights and clear the gradients."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole, in host memory; trainable ones from their fp32 masters.

        Every rank must run it to its end; tied parameters come once for each name.
        """

    def facts(self) -> Facts:
        """What the engine really holds, for the techniques to check after the first step."""
