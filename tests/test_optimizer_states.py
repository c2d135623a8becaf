"""8-bit optimizer state with 32-bit embeddings is what every engine and stage really holds."""

from typing import Any

import pytest

from tests import engines, ranks
from tests.engines import ENGINES, Strategy

EIGHT_BIT = {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]}


def held_states(world: Any, strategies: list[Strategy]) -> list[dict[str, set[str]]]:
    """In a rank, for each strategy: dtypes of the optimizer's state by the kind of parameter it belongs to.

    Read from the tensors of the wrapped optimizer itself, by way of the names in its parameter groups.
    """
    from memlaunch.strategies import TECHNIQUES, optimizer

    found = []
    for strategy in strategies:
        setup = engines.setup_of(strategy, world)
        model = engines.bert()
        for technique in TECHNIQUES:
            technique.prepare_model(model, setup)
        groups = optimizer.parameter_groups(model, setup)
        engine = engines.start(setup, world, model=engines.bert())
        for number in range(2):
            engines.step(engine, number, world)
        base = getattr(engine, "_base", None) or engine._optimizer  # type: ignore[attr-defined]
        kinds: dict[str, set[str]] = {}
        if strategy.engine == "torch" or strategy.stage == 0:
            members = [(i, p) for i, group in enumerate(base.param_groups) for p in group["params"]]
        else:
            members = list(engine._optimized(engine._engine.optimizer))  # type: ignore[attr-defined]
        for index, parameter in members:
            for value in base.state[parameter].values():
                if getattr(value, "numel", lambda: 0)() >= parameter.numel() > 1:
                    for name in groups[index]["names"]:
                        kinds.setdefault(_kind(name), set()).add(str(value.dtype).removeprefix("torch."))
        found.append(kinds)
    return found


def _kind(name: str) -> str:
    if "LayerNorm" in name or name.endswith("bias"):
        return "norms and biases"
    if "embeddings" in name:
        return "embeddings"
    return "classifier" if name.startswith("classifier") else "linears"


@pytest.mark.parametrize("size", [1, 2])
def test_embeddings_are_float32_and_linears_uint8_at_every_stage(size: int) -> None:
    strategies = [
        Strategy(*engine, optimizer=EIGHT_BIT, freeze=freeze)
        for engine in ENGINES
        for freeze in [(), ("encoder.layer[:2]",), ("embeddings.position_embeddings", "encoder.layer[0]")]
    ]
    for held in ranks.run(size, held_states, strategies):
        for strategy, kinds in zip(strategies, held, strict=True):
            where = f"{strategy}, {size} rank(s)"
            assert kinds["embeddings"] == {"float32"}, where
            assert kinds["linears"] == {"uint8"}, where
            assert kinds["norms and biases"] == {"float32"}, where
            assert kinds["classifier"] == {"float32"}, f"{where}: 128 elements are too few for 8 bits"


def swapped_bits(world: Any) -> list[str]:
    """In a rank: what the check says of an engine whose groups hold other bits than the job asks for."""
    from memlaunch.strategies import optimizer

    setup = engines.setup_of(Strategy("deepspeed", 2, optimizer=EIGHT_BIT), world)
    engine = engines.start(setup, world)
    engines.step(engine, 0, world)
    for group in engine._base.param_groups:  # type: ignore[attr-defined]
        group["optim_bits"] = 40 - group["optim_bits"]
    return list(optimizer.TECHNIQUE.verify(setup, engine.facts()))


def test_state_of_other_bits_than_asked_for_is_noticed() -> None:
    (wrong,) = ranks.run(1, swapped_bits)
    assert sorted(wrong) == [
        "a group of 32-bit optimizer state holds uint8",
        "a group of 8-bit optimizer state holds float32",
    ]
