"""Padding: samples of different lengths become one rectangular micro-batch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from memlaunch.strategies.settings import Settings

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


class PaddingSettings(Settings):
    """How long a micro-batch is."""

    SHORTHAND = "mode"

    mode: Literal["dynamic", "fixed"] = Field(
        default="dynamic",
        description="`dynamic` pads to the longest sample of the micro-batch, `fixed` to `max_length`.",
    )
    multiple_of: int = Field(
        default=1, ge=1, description="Round the padded length up to a multiple of this; 8 suits tensor cores."
    )


def padded_lengths(
    longest: "npt.NDArray[Any]", settings: PaddingSettings, max_length: int
) -> "npt.NDArray[Any]":
    """Tokens a row of micro-batches whose longest samples have ``longest`` tokens, in the same shape.

    Rounding up stops at ``max_length``: beyond it a model may have no positions.
    """
    import numpy as np

    length = np.full_like(longest, max_length) if settings.mode == "fixed" else longest
    step = settings.multiple_of
    widths: npt.NDArray[Any] = np.minimum(-(-length // step) * step, np.maximum(max_length, longest))
    return widths


def padded_length(longest: int, settings: PaddingSettings, max_length: int) -> int:
    """:func:`padded_lengths` of one micro-batch."""
    import numpy as np

    return int(padded_lengths(np.array(longest), settings, max_length))


def pad(
    samples: "Sequence[Mapping[str, Sequence[int] | npt.NDArray[Any]]]",
    settings: PaddingSettings,
    max_length: int,
    fill: Mapping[str, int],
) -> "dict[str, torch.Tensor]":
    """Pad ``samples`` on the right into int64 tensors of shape (samples, padded length).

    Args:
        samples: for each sample, field name -> token values; all fields of a sample have one length.
        fill: field name -> the value to pad it with; its keys are the fields of the result.
    """
    import numpy as np
    import torch

    longest = max(len(next(iter(sample.values()))) for sample in samples)
    length = padded_length(longest, settings, max_length)
    batch: dict[str, torch.Tensor] = {}
    for name, value in fill.items():
        rows = np.full((len(samples), length), value, dtype=np.int64)  # quicker to fill than a tensor
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample[name])] = sample[name]
        batch[name] = torch.from_numpy(rows)
    return batch
