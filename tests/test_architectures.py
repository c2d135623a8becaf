"""Architectures of transformers with random weights: their config, and the attention that they have."""

from typing import Any

import pytest

from memlaunch.launcher.job import ModelSection
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.model import build

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def section(architecture: str, **changes: Any) -> ModelSection:
    attention = {"attention": changes.pop("attention")} if "attention" in changes else {}
    return ModelSection(architecture=architecture, config={**SMALL, **changes}, **attention)


def attention_of(model: ModelSection) -> str:
    return str(build(model, ["no", "yes"], pad_token=0, seed=1).config._attn_implementation)


def test_sdpa_is_eager_where_an_architecture_has_no_other() -> None:
    assert attention_of(section("bert")) == "sdpa"
    assert attention_of(section("bert", attention="eager")) == "eager"
    assert attention_of(section("deberta-v2")) == "eager"


def test_an_attention_that_was_asked_for_and_is_not_there_is_an_error() -> None:
    with pytest.raises(JobMismatch):
        attention_of(section("deberta-v2", attention="flash_attention_2"))


def test_a_config_takes_the_keys_that_only_the_code_of_the_architecture_knows() -> None:
    model = build(section("deberta-v2", relative_attention=True, position_buckets=16), ["a", "b"], 0, 1)
    assert model.deberta.encoder.position_buckets == 16
    with pytest.raises(JobMismatch, match="is not in the config"):
        build(section("deberta-v2", position_bucket=16), ["a", "b"], 0, 1)
