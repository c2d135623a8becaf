"""A small CNN on handwritten digits: 1,797 pictures of 8 x 8 points, which scikit-learn brings along."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from memlaunch.launcher import Entry


class Block(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.relu(pictures + self.layers(pictures))


class Cnn(nn.Module):
    """Blocks at one resolution, the mean over the picture, and a score for each digit."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.classifier = nn.Linear(channels, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.stem(pictures)
        for block in self.blocks:
            features = block(features)
        return self.classifier(features.mean(dim=(2, 3)))


def loss(scores: Tensor, digits: Tensor) -> tuple[Tensor, int]:
    """The cross entropy summed over a micro-batch, and how many pictures that are."""
    return nn.functional.cross_entropy(scores, digits, reduction="sum"), len(digits)


def metrics(scores: Tensor, digits: Tensor) -> dict[str, Tensor]:
    """How many pictures are read right; evaluations show the share of all."""
    return {"accuracy": (scores.argmax(dim=1) == digits).sum()}


def build(channels: int = 32, blocks: int = 2) -> Entry:
    """What `memlaunch run` trains; its arguments stand in `model.config`."""
    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(found.target)
    held_out = torch.arange(len(digits)) % 5 == 0
    return Entry(
        model=Cnn(channels, blocks),
        train=TensorDataset(pictures[~held_out], digits[~held_out]),
        eval=TensorDataset(pictures[held_out], digits[held_out]),
        loss=loss,
        metrics=metrics,
    )
