"""What ZeRO and offload are asked for, they do, and nothing else about the training changes."""

import dataclasses
from typing import Any

import pytest
import torch

from memlaunch.strategies import TECHNIQUES
from tests import engines, ranks
from tests.engines import Strategy

STEPS = 4

OPTIMIZER, BOTH = {"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}

STRATEGIES = [
    Strategy("torch", 0),
    # Before the others of stage 3: they put DeepSpeed's own linear layer in place for the whole process.
    Strategy("deepspeed", 3, checkpointing="selective"),
    Strategy("deepspeed", 1, zero=OPTIMIZER),
    Strategy("deepspeed", 2, zero=OPTIMIZER),
    Strategy("deepspeed", 3, zero=OPTIMIZER),
    Strategy("deepspeed", 3, zero=BOTH),
    Strategy("deepspeed", 2, zero={"bucket_size": 1000}),
    Strategy("deepspeed", 3, zero={"bucket_size": 1000}, checkpointing={"mode": "full", "every": 2}),
]


def train(world: Any, strategies: list[Strategy]) -> list[dict[str, Any]]:
    """In a rank: losses, gradient norms, final weights, what the checks say, and where the state lives."""
    results = []
    for strategy in strategies:
        setup = engines.setup_of(strategy, world)
        engine = engines.start(setup, world)
        lines = [engines.step(engine, number, world) for number in range(STEPS)]
        facts = engine.facts()
        results.append(
            {
                "losses": [line["loss"] for line in lines],
                "norms": [line["grad_norm"] for line in lines],
                "weights": engines.numpy(engines.weights(engine)),
                "wrong": [
                    sentence for technique in TECHNIQUES for sentence in technique.verify(setup, facts)
                ],
                "offloaded": (facts.offload_optimizer, facts.offload_parameters),
            }
        )
    return results


@pytest.mark.parametrize("size", [1, 2])
def test_offload_and_buckets_change_where_things_are_and_nothing_else(size: int) -> None:
    initial = {name: p.detach() for name, p in engines.bert().named_parameters()}
    first, *others = ranks.run(size, train, STRATEGIES)[0]
    expected = {name: torch.from_numpy(array) for name, array in first["weights"].items()}
    for strategy, result in zip(STRATEGIES[1:], others, strict=True):
        assert result["losses"] == pytest.approx(first["losses"], rel=1e-5), strategy
        assert result["norms"] == pytest.approx(first["norms"], rel=1e-4), strategy
        weights = {name: torch.from_numpy(array) for name, array in result["weights"].items()}
        assert engines.distance(weights, expected, initial) < 1e-3, strategy
        assert result["wrong"] == [], strategy
        asked = tuple(strategy.zero.get(key, "none") for key in BOTH)
        assert result["offloaded"] == asked, strategy


def verify_against_another(world: Any) -> list[list[str]]:
    """In a rank: what the checks say when an engine is held against a setup that it was not started with."""
    setup = engines.setup_of(Strategy("deepspeed", 2, zero=OPTIMIZER, freeze=("embeddings",)), world)
    engine = engines.start(setup, world)
    engines.step(engine, 0, world)
    facts = engine.facts()
    others = [
        setup,
        engines.setup_of(Strategy("deepspeed", 3, zero=OPTIMIZER, freeze=("embeddings",)), world),
        engines.setup_of(Strategy("deepspeed", 2, freeze=("embeddings",)), world),
        engines.setup_of(Strategy("deepspeed", 2, zero=OPTIMIZER, freeze=("encoder.layer[0]",)), world),
        dataclasses.replace(setup, gradient_accumulation_steps=7),
        dataclasses.replace(setup, max_grad_norm=0.5),
        engines.setup_of(
            Strategy(
                "deepspeed",
                2,
                zero=OPTIMIZER,
                freeze=("embeddings",),
                precision={"dtype": "bf16", "parameters": "same"},
            ),
            world,
        ),
    ]
    return [[line for technique in TECHNIQUES for line in technique.verify(other, facts)] for other in others]


def test_what_did_not_take_is_noticed() -> None:
    (told,) = ranks.run(1, verify_against_another)
    same, *different = told
    assert same == []
    for sentences, word in zip(
        different,
        ["zero.stage", "offload_optimizer", "is trained", "accumulation_steps", "max_grad_norm", "bfloat16"],
        strict=True,
    ):
        assert any(word in sentence for sentence in sentences), (word, sentences)
