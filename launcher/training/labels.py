"""The labels of a micro-batch, for each task: what its loss is the loss of."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memlaunch.launcher.training.tasks import IGNORED
from memlaunch.launcher.training.tokens import Tokens

#: (samples, inputs, which of their tokens are real) -> labels; may change the inputs.
Labelling = Callable[[Sequence[Any], dict[str, Tensor], Tensor], Tensor]

#: BERT's shares: of the tokens that are to be predicted, and of those the masked and the random ones.
#: Devlin et al., BERT (NAACL 2019), section 3.1.
CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Visit:
    """A sample in an epoch, where what is made of it depends on that."""

    sample: int
    epoch: int

    def __index__(self) -> int:
        return self.sample


def tokens_themselves(items: Sequence[Any], inputs: dict[str, Tensor], real: Tensor) -> Tensor:
    """For causal-lm: each token is the label of the one before it, as the loss shifts them."""
    return inputs["input_ids"].masked_fill(~real, IGNORED)


@dataclass(frozen=True)
class Classes:
    """For sequence-classification: shape (samples,).

    Attributes:
        class_of_code: the class of each label code.
    """

    tokens: Tokens
    class_of_code: np.ndarray[Any, np.dtype[np.int64]]

    def __call__(self, items: Sequence[Any], inputs: dict[str, Tensor], real: Tensor) -> Tensor:
        assert self.tokens.codes is not None
        return torch.from_numpy(self.class_of_code[self.tokens.codes[_indices(items)]])


@dataclass(frozen=True)
class WordClasses:
    """For token-classification: the class of a word at its first token, shape (samples, tokens)."""

    tokens: Tokens
    class_of_code: np.ndarray[Any, np.dtype[np.int64]]

    def __call__(self, items: Sequence[Any], inputs: dict[str, Tensor], real: Tensor) -> Tensor:
        labels = torch.full(real.shape, IGNORED)
        for row, index in zip(labels, _indices(items), strict=True):
            codes = self.tokens.labels_of(index)
            classes = np.where(codes == IGNORED, IGNORED, self.class_of_code[np.maximum(codes, 0)])
            row[: len(classes)] = torch.from_numpy(classes)
        return labels


@dataclass(frozen=True)
class Targets:
    """For seq2seq-lm: the tokens of the target, shape (samples, tokens of the longest target).

    The decoder is given them one place later.

    Attributes:
        shift: labels -> what the decoder sees.
    """

    tokens: Tokens
    shift: Callable[[Tensor], Tensor]

    def __call__(self, items: Sequence[Any], inputs: dict[str, Tensor], real: Tensor) -> Tensor:
        rows = [torch.tensor(self.tokens.labels_of(index), dtype=torch.int64) for index in _indices(items)]
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        inputs["decoder_input_ids"] = self.shift(labels)
        return labels


@dataclass(frozen=True)
class Masks:
    """For masked-lm: hides some tokens from the model; those are the labels, shape (samples, tokens).

    What is hidden of a sample follows from (seed, epoch, sample) alone. In an evaluation there is no epoch,
    and it is always the same.

    Attributes:
        mask: the token that stands for a hidden one.
        vocabulary: tokens; one of them, at random, stands for some of the hidden.
        special: tokens that are not predicted, such as separators.
    """

    seed: int
    mask: int
    vocabulary: int
    special: frozenset[int]

    def __call__(self, items: Sequence[Any], inputs: dict[str, Tensor], real: Tensor) -> Tensor:
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        width = real.sum(dim=1).tolist()
        for row, label, item, length in zip(ids, labels, items, width, strict=True):
            chosen, seen = self._hide(row[:length].numpy(), int(item), getattr(item, "epoch", None))
            label[:length][chosen] = row[:length][chosen]
            row[:length] = seen
        return labels

    def _hide(self, ids: np.ndarray[Any, Any], sample: int, epoch: int | None) -> tuple[Tensor, Tensor]:
        """(which tokens are to be predicted, what the model sees)."""
        key = hashlib.blake2b(f"{self.seed}/{epoch}/{sample}/mask".encode(), digest_size=16).digest()
        bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(3 * len(ids))
        choice, way, other = bits.reshape(3, -1)
        chosen = (_fractions(choice) < CHOSEN) & ~np.isin(ids, list(self.special))
        ways = _fractions(way)
        seen = np.where(chosen & (ways < MASKED), self.mask, ids)
        randomly = chosen & (ways >= MASKED) & (ways < MASKED + RANDOM)
        seen = np.where(randomly, (other % np.uint64(self.vocabulary)).astype(np.int64), seen)
        return torch.from_numpy(chosen), torch.from_numpy(seen)


def _fractions(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """64 random bits as numbers in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) / 2**53


def _indices(items: Sequence[Any]) -> list[int]:
    return [int(item) for item in items]
