"""What ZeRO and offload are asked for, they do, and nothing else about the training changes."""

import dataclasses
from typing import Any

import pytest
import torch

from memlaunch.strategies import TECHNIQUES, sharding
from memlaunch.strategies.technique import NotApplicable
from tests import engines, ranks
from tests.engines import Strategy

STEPS = 4

OPTIMIZER, BOTH = {"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}

STRATEGIES = [
    Strategy("torch", 0),
    Strategy("torch", 2, zero=OPTIMIZER),
    Strategy("torch", 3, zero=BOTH, checkpointing="full"),
    Strategy("torch", 3, checkpointing="selective"),
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


def sharded(world: Any) -> list[dict[str, Any]]:
    """In a rank: what each stage holds, and its losses with a look at other data behind each step."""
    found = []
    for stage in (0, 2, 3):
        engine = engines.start(engines.setup_of(Strategy("torch", stage), world), world)
        losses = []
        for number in range(STEPS):
            losses.append(engines.step(engine, number, world)["loss"])
            stage_held = engine.facts().zero_stage
            with torch.no_grad():
                engine.forward(engines.window(9, world)[0].inputs)
        blocks = list(engine.blocks())
        found.append(
            {
                "losses": losses,
                "stage": stage_held,
                "elements": {piece.name: block.weight.numel() for block in blocks for piece in block.pieces},
                "shapes alike": all(
                    block.state[moment].shape == block.weight.shape
                    for block in blocks
                    for moment in ("exp_avg", "exp_avg_sq")
                    if block.pieces and block.state is not None
                ),
            }
        )
    return found


def test_fsdp2_holds_a_share_of_each_parameter_and_of_its_state() -> None:
    whole = {name: parameter.numel() for name, parameter in engines.bert().named_parameters()}
    (ddp, *one), (_, *other) = ranks.run(2, sharded)
    assert ddp["elements"] == whole
    assert [held["stage"] for held in one] == [2, 3]
    for shares in zip(one, other, strict=True):
        assert shares[0]["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        assert all(held["shapes alike"] for held in shares)
        for name, elements in whole.items():
            assert [held["elements"][name] for held in shares] == [elements // 2, elements // 2], name


def verify_fsdp2(world: Any) -> list[list[str]]:
    """In a rank: what the checks say of stage 2 beside stages 2 and 3, and once it keeps parameters."""
    setups = [engines.setup_of(Strategy("torch", stage), world) for stage in (2, 3)]
    engine = engines.start(setups[0], world)
    engines.step(engine, 0, world)
    told = [list(sharding.TECHNIQUE.verify(setup, engine.facts())) for setup in setups]
    with engine.micro_step(last=False):
        engine.backward(engine.forward(engines.window(1, world)[0].inputs).logits.sum())
    return [*told, list(sharding.TECHNIQUE.verify(setups[0], engine.facts()))]


def test_fsdp2_of_another_stage_or_with_whole_parameters_is_noticed() -> None:
    assert ranks.run(1, verify_fsdp2) == [
        [[], ["zero.stage is 2, the job says 3"], ["zero.stage is 0, the job says 2"]]
    ]


def awkward(world: Any, strategies: list[Strategy]) -> list[list[float]]:
    """In a rank: the losses of a model two blocks of which share a weight, one with the embeddings."""
    results = []
    for strategy in strategies:
        model = engines.bert()
        first, second, third = model.bert.encoder.layer
        second.intermediate.dense.weight = first.intermediate.dense.weight
        third.output.LayerNorm.bias = model.bert.embeddings.LayerNorm.bias
        engine = engines.start(engines.setup_of(strategy, world), world, model)
        losses = [engines.step(engine, number, world)["loss"] for number in range(STEPS)]
        tied = {
            name: tensor for name, tensor in engine.weights() if name.endswith("intermediate.dense.weight")
        }
        assert len({tuple(tensor.flatten().tolist()) for tensor in tied.values()}) == len(tied) - 1
        results.append(losses)
    return results


def test_blocks_that_share_a_parameter_are_sharded_too() -> None:
    ways = [Strategy("torch", 0), Strategy("torch", 2), Strategy("torch", 3, checkpointing="full")]
    expected, *others = ranks.run(2, awkward, ways)[0]
    for losses in others:
        assert losses == pytest.approx(expected, rel=1e-5)


def with_a_number(world: Any) -> tuple[str, str]:
    """In a rank: what FSDP2 says of a model with a parameter without dimensions."""
    model = engines.bert()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    try:
        engines.start(engines.setup_of(Strategy("torch", 3), world), world, model)
    except NotApplicable as error:
        return error.key, str(error)
    raise AssertionError("it took the number")


def test_a_parameter_that_cannot_be_sharded_is_named() -> None:
    ((key, told),) = ranks.run(1, with_a_number)
    assert key == "strategy.zero.stage"
    assert "`scale` is a single number" in told


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
