"""AdamW's parameter groups: which state is held in 8 bits, and what is decayed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from memlaunch.strategies import optimizer
from memlaunch.strategies.optimizer import MIN_8BIT_ELEMENTS, OptimizerSettings, state_bits
from memlaunch.strategies.technique import NotApplicable
from tests import setups

EIGHT_BIT: dict[str, Any] = {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]}


def bert() -> nn.Module:
    """Linears of 64 x 64 and 64 x 128, 4,096 elements and more."""
    return setups.bert(hidden_size=64, intermediate_size=128, num_hidden_layers=2)


def grouped(model: nn.Module, **choices: Any) -> dict[tuple[int, float], set[str]]:
    groups = optimizer.parameter_groups(model, setups.setup(weight_decay=0.1, **choices))
    assert all(len(group["params"]) == len(group["names"]) for group in groups)
    return {(group["optim_bits"], group["weight_decay"]): set(group["names"]) for group in groups}


def names(model: nn.Module, *, dimensions: int, embeddings: bool) -> set[str]:
    return {
        name
        for name, parameter in model.named_parameters()
        if (parameter.ndim >= 2) == (dimensions >= 2) and ("embeddings" in name) == embeddings
    }


def test_linears_in_8_bits_embeddings_in_32_and_no_decay_on_biases_and_norms() -> None:
    model = bert()
    linears = names(model, dimensions=2, embeddings=False) - {"classifier.weight"}
    assert grouped(model, optimizer=EIGHT_BIT) == {
        (8, 0.1): linears,
        (32, 0.1): names(model, dimensions=2, embeddings=True) | {"classifier.weight"},  # 2 x 64 is too small
        (32, 0.0): names(model, dimensions=1, embeddings=True) | names(model, dimensions=1, embeddings=False),
    }


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model = setups.prepare(bert(), freeze=("bert",), optimizer=EIGHT_BIT)
    assert grouped(model, optimizer=EIGHT_BIT) == {
        (32, 0.1): {"classifier.weight"},
        (32, 0.0): {"classifier.bias"},
    }


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_the_groups_hold_every_trainable_parameter_once(traits: list[tuple[bool, bool, bool]]) -> None:
    """Each parameter is or is not: trainable, a matrix, large."""
    model = nn.ParameterList(
        nn.Parameter(torch.zeros((64 if large else 2, 64) if matrix else (64,)), requires_grad=trainable)
        for trainable, matrix, large in traits
    )
    groups = optimizer.parameter_groups(model, setups.setup(optimizer="adamw"))
    members = [name for group in groups for name in group["names"]]
    assert sorted(members) == [str(i) for i, (trainable, _, _) in enumerate(traits) if trainable]
    assert all(group["params"] for group in groups)
    keys = [(group["optim_bits"], group["weight_decay"]) for group in groups]
    assert len(keys) == len(set(keys))


def test_tied_weights_are_grouped_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(64, 64)
            self.head = nn.Linear(64, 64)
            self.head.weight = self.embeddings.weight

    assert grouped(Tied(), optimizer=EIGHT_BIT) == {
        (32, 0.1): {"embeddings.weight"},
        (32, 0.0): {"head.bias"},
    }


def test_the_last_override_that_matches_holds() -> None:
    shapes = {"body.0.weight": (64, 64), "body.1.weight": (64, 64), "head.weight": (64, 64)}

    def bits(*overrides: tuple[str, int]) -> list[int]:
        section = {"overrides": [{"modules": modules, "bits": bits} for modules, bits in overrides]}
        return list(state_bits(OptimizerSettings.model_validate(section), shapes).values())

    assert bits() == [32, 32, 32]
    assert bits(("*", 8), ("head", 32)) == [8, 8, 32]
    assert bits(("head", 32), ("*", 8)) == [8, 8, 8]
    assert bits(("body", 8), ("body[0]", 32), ("body[-1]", 8)) == [32, 8, 32]


def test_norms_biases_and_small_tensors_keep_32_bits_whatever_the_overrides_say() -> None:
    settings = OptimizerSettings.model_validate({"bits": 8, "overrides": [{"modules": "*", "bits": 8}]})
    shapes = {
        "norm.weight": (MIN_8BIT_ELEMENTS,),
        "small.weight": (MIN_8BIT_ELEMENTS - 1, 1),
        "large.weight": (MIN_8BIT_ELEMENTS, 1),
    }
    assert state_bits(settings, shapes) == {"norm.weight": 32, "small.weight": 32, "large.weight": 8}


def test_an_override_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    section = {
        "bits": 8,
        "overrides": [{"modules": "pooler", "bits": 32}, {"modules": "embedings", "bits": 32}],
    }
    with pytest.raises(NotApplicable, match="`embedings` matches no module") as refusal:
        grouped(bert(), optimizer=section)
    assert refusal.value.key == "strategy.optimizer.overrides[1].modules"
    assert "`embeddings`" in refusal.value.hint


def test_an_override_of_frozen_modules_only_is_useless() -> None:
    model = setups.prepare(bert(), freeze=("embeddings",))
    settings = OptimizerSettings.model_validate(
        {"bits": 8, "overrides": [{"modules": "embeddings", "bits": 32}, {"modules": "*dense*", "bits": 32}]}
    )
    assert optimizer.useless_overrides(model, settings) == ["embeddings"]


def trained(section: Any, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after some steps on one process, no engine in between."""
    model = setups.prepare(bert(), optimizer=section)
    setup = setups.setup(optimizer=section)
    built = optimizer.build(optimizer.parameter_groups(model, setup), setup)
    for _ in range(steps):
        model(input_ids=torch.arange(24).view(2, 12), labels=torch.tensor([0, 1])).loss.backward()
        built.step()
        built.zero_grad()
    return model, built


def moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq", "state1", "state2") if name in state}


def test_the_state_really_has_the_bits_of_its_group() -> None:
    model, built = trained(EIGHT_BIT)
    bits = state_bits(
        OptimizerSettings.model_validate(EIGHT_BIT),
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
    )
    assert set(bits.values()) == {8, 32}
    for name, parameter in model.named_parameters():
        held = moments(built.state[parameter])
        assert len(held) == 2, name
        dtype = {8: torch.uint8, 32: torch.float32}[bits[name]]
        assert {tensor.dtype for tensor in held.values()} == {dtype}, name


def test_8_bit_state_takes_about_a_quarter_of_the_bytes() -> None:
    def size(section: Any) -> int:
        _, built = trained(section, steps=1)
        states = built.state.values()
        return sum(
            t.nbytes for state in states for t in state.values() if isinstance(t, Tensor) and t.numel() > 1
        )

    everything = {"bits": 8}
    assert 0.25 < size(everything) / size("adamw") < 0.45  # norms, biases and the classifier stay in 32 bits


def test_8_bit_state_trains_nearly_as_32_bit_state_does() -> None:
    start, exact, quantised = (
        {name: parameter.detach() for name, parameter in model.named_parameters()}
        for model in (bert(), trained("adamw")[0], trained(EIGHT_BIT)[0])
    )

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return float(sum((one[name] - other[name]).square().sum() for name in start)) ** 0.5

    assert 0 < distance(exact, quantised) < 0.2 * distance(exact, start)


def test_32_bit_state_is_torch_adamw() -> None:
    _, built = trained("adamw", steps=1)
    assert type(built) is torch.optim.AdamW
    assert {group["optim_bits"] for group in built.param_groups} == {32}


@pytest.mark.parametrize(
    ("section", "offload", "keys"),
    [
        ("adamw", "cpu", []),
        (EIGHT_BIT, "none", []),
        (EIGHT_BIT, "cpu", ["strategy.optimizer.bits"]),
        ({"overrides": [{"modules": "*", "bits": 8}]}, "cpu", ["strategy.optimizer.overrides"]),
    ],
    ids=str,
)
def test_8_bit_state_is_not_offloaded(section: Any, offload: str, keys: list[str]) -> None:
    setup = setups.setup(
        engine="deepspeed", zero={"stage": 2, "offload_optimizer": offload}, optimizer=section
    )
    assert [conflict.key for conflict in optimizer.TECHNIQUE.conflicts(setup)] == keys


def test_an_override_may_name_any_name_of_a_tied_parameter() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2))
    for name in ("transformer.wte", "lm_head"):
        section = {"bits": 8, "overrides": [{"modules": name, "bits": 32}]}
        groups = optimizer.parameter_groups(model, setups.setup(optimizer=section))
        (tied,) = [group for group in groups if "transformer.wte.weight" in group["names"]]
        assert tied["optim_bits"] == 32
        assert sum("lm_head.weight" in group["names"] for group in groups) == 0
