"""16-bit training agrees between engines, and an overflow costs one step and nothing else."""

import itertools
from typing import Any

import pytest
import torch

from tests import engines, ranks
from tests.engines import ENGINES, Strategy

STEPS = 4


def train(world: Any, strategies: list[Strategy]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """In a rank: the lines and the final weights of each strategy."""
    engines.claim_fp16()
    results = []
    for strategy in strategies:
        engine = engines.start(engines.setup_of(strategy, world), world)
        lines = [engines.step(engine, number, world) for number in range(STEPS)]
        results.append((lines, engines.numpy(engines.weights(engine))))
    return results


#: Precision, and how far apart engines may come out: in the losses, and in the change of the weights. It is
#: 16-bit rounding, which Adam magnifies in the weights; with 16-bit parameters the gradients are rounded too.
PRECISIONS: list[tuple[Any, float, float]] = [
    ("bf16", 1e-4, 0.03),
    ("fp16", 1e-4, 0.03),
    ({"dtype": "bf16", "parameters": "same"}, 2e-3, 0.1),
    ({"dtype": "fp16", "parameters": "same"}, 2e-4, 0.03),
]


@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_agrees_with_the_torch_engine(size: int) -> None:
    ways = [
        (Strategy(engine, stage, precision=precision), *tolerances)
        for precision, *tolerances in PRECISIONS
        for engine, stage in ENGINES
        if not (isinstance(precision, dict) and (engine, stage) == ("deepspeed", 0))
    ]
    initial = {name: p.detach() for name, p in engines.bert().named_parameters()}
    results = ranks.run(size, train, [strategy for strategy, *_ in ways])[0]
    for (strategy, loss_tolerance, weight_tolerance), (lines, arrays) in zip(ways, results, strict=True):
        weights = _tensors(arrays)
        if (strategy.engine, strategy.stage) == ("torch", 0):
            expected_lines, expected = lines, weights
            continue
        loss_error = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines, expected_lines, strict=True))
        weight_error = engines.distance(weights, expected, initial)
        figures = f"{size} rank(s), {strategy}: loss {loss_error:.1e}, weights {weight_error:.1e}"
        print(figures)
        assert loss_error <= loss_tolerance, figures
        assert weight_error <= weight_tolerance, figures


def _tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


PARAMETERS = [(*engine, "fp32") for engine in ENGINES] + [
    ("torch", 0, "same"),
    ("torch", 2, "same"),
    ("torch", 3, "same"),
    ("deepspeed", 1, "same"),
    ("deepspeed", 2, "same"),
    ("deepspeed", 3, "same"),
]


def overflow(world: Any, strategies: list[Strategy]) -> list[dict[str, Any]]:
    """In a rank, for each strategy: four steps of which the second and third overflow on the last rank.

    Gives the lines, whether the weights moved in each step, the final weights, and those of another run that
    makes the first and the last step only.
    """
    engines.claim_fp16()
    results = []
    for strategy in strategies:
        setup = engines.setup_of(strategy, world)
        engine = engines.start(setup, world)
        poison = False

        def poisoned(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf if poison else gradient  # noqa: B023

        def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(poisoned)

        # On the way to the parameters, as a real overflow is: engines hang hooks of their own on those.
        engine.module.get_submodule("classifier").register_forward_hook(watch)
        lines, weights = [], [engines.weights(engine)]
        for number in range(STEPS):
            poison = number in (1, 2) and world.rank == world.size - 1
            lines.append(engines.step(engine, number, world))
            weights.append(engines.weights(engine))
        other = engines.start(setup, world)
        for number in (0, 3):
            engines.step(other, number, world)
        results.append(
            {
                "lines": lines,
                "moved": [
                    any(not torch.equal(before[name], after[name]) for name in before)
                    for before, after in itertools.pairwise(weights)
                ],
                "final": engines.numpy(weights[-1]),
                "expected": engines.numpy(engines.weights(other)),
            }
        )
    return results


@pytest.mark.parametrize(("size", "hysteresis"), [(1, 2), (2, 1)])
def test_an_overflow_is_skipped_and_halves_the_scale(size: int, hysteresis: int) -> None:
    precision = {"dtype": "fp16", "initial_scale": 1024.0, "hysteresis": hysteresis}
    strategies = [
        Strategy(engine, stage, precision={**precision, "parameters": parameters})
        for engine, stage, parameters in PARAMETERS
    ]
    initial = {name: p.detach() for name, p in engines.bert().named_parameters()}
    scales = {1: [1024.0, 1024.0, 512.0, 256.0], 2: [1024.0, 1024.0, 1024.0, 512.0]}[hysteresis]
    for results in ranks.run(size, overflow, strategies):
        for strategy, result in zip(strategies, results, strict=True):
            lines = result["lines"]
            assert [line["skipped"] for line in lines] == [False, True, True, False], strategy
            assert result["moved"] == [True, False, False, True], strategy
            assert [line["loss_scale"] for line in lines] == scales, strategy
            assert [line["grad_norm"] is None for line in lines] == [False, True, True, False], strategy
            apart = engines.distance(_tensors(result["final"]), _tensors(result["expected"]), initial)
            assert apart < 5e-3, f"{strategy}: the step after the overflow is not that of a run without it"
