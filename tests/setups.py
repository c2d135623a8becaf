"""The setup of a run, and small models, for tests that look at one technique without an engine."""

from typing import Any

import torch
import transformers
from torch import nn

from memlaunch.strategies import TECHNIQUES
from memlaunch.strategies.checkpointing import CheckpointingSettings
from memlaunch.strategies.optimizer import OptimizerSettings
from memlaunch.strategies.precision import PrecisionSettings
from memlaunch.strategies.sharding import ZeroSettings
from memlaunch.strategies.technique import Setup

SECTIONS: dict[str, Any] = {
    "zero": ZeroSettings,
    "precision": PrecisionSettings,
    "activation_checkpointing": CheckpointingSettings,
    "optimizer": OptimizerSettings,
}


def setup(**choices: Any) -> Setup:
    """One rank on a CPU with the torch engine; a section of the strategy is what a job file would hold."""
    sections = {key: kind.model_validate(choices.pop(key, {})) for key, kind in SECTIONS.items()}
    rest: dict[str, Any] = {
        "engine": "torch",
        "device": "cpu",
        "world_size": 1,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "max_grad_norm": 1.0,
    }
    return Setup(**{**rest, **choices}, **sections)


def prepare(model: nn.Module, **choices: Any) -> nn.Module:
    """``model``, as a run with these choices prepares it."""
    chosen = setup(**choices)
    for technique in TECHNIQUES:
        technique.prepare_model(model, chosen)
    return model.train()


def bert(**changes: Any) -> transformers.BertForSequenceClassification:
    """Four layers of 32, no dropout; always the same weights."""
    config: dict[str, Any] = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**(config | changes)))
