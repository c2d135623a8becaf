"""The shape of the micro-batches that a job is traced with."""

from dataclasses import asdict, dataclass
from typing import Any


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
        targets: tokens of each target, for seq2seq-lm.
    """

    samples: int
    tokens: int
    micro_batches: int
    fields: tuple[str, ...]
    classes: int | None
    pad_token: int
    padded: bool = True
    packed: bool = False
    targets: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shape":
        """From JSON."""
        return cls(**{**values, "fields": tuple(values["fields"])})
