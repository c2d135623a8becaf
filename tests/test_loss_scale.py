"""The loss scale of fp16: one rule on every engine, unscaling before clipping, and fp32 masters."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memlaunch.strategies import precision
from memlaunch.strategies.precision import LossScale, MasterWeights, PrecisionSettings, ScaleAtMinimum
from tests import setups


def moves(scale: LossScale, overflows: str) -> list[float]:
    """The scale after each step; ``x`` is an overflow, ``.`` a step without."""
    after = []
    for character in overflows:
        scale.update(character == "x")
        after.append(scale.scale)
    return after


def dynamic(**settings: Any) -> LossScale:
    return LossScale.of(PrecisionSettings(dtype="fp16", **settings))


def test_the_scale_halves_once_the_hysteresis_is_used_up() -> None:
    assert moves(dynamic(initial_scale=1024.0, hysteresis=1), "xx") == [512, 256]
    assert moves(dynamic(initial_scale=1024.0, hysteresis=2), "x.xx") == [1024, 1024, 512, 256]
    assert moves(dynamic(initial_scale=1024.0, hysteresis=3), "xxx") == [1024, 1024, 512]


def test_the_scale_doubles_at_the_step_after_an_interval_without_overflow() -> None:
    scale = dynamic(initial_scale=4.0, growth_interval=2)
    assert moves(scale, "....." + "x" + "...") == [4, 4, 8, 8, 16, 16, 16, 16, 32]


def test_growth_restores_the_hysteresis() -> None:
    scale = dynamic(initial_scale=4.0, growth_interval=1, hysteresis=2)
    assert moves(scale, "xx" + ".." + "xx") == [4, 2, 2, 4, 4, 2]


def test_an_overflow_at_the_minimum_ends_the_run() -> None:
    scale = dynamic(initial_scale=4.0, min_scale=2.0, hysteresis=1)
    assert moves(scale, "x") == [2]
    with pytest.raises(ScaleAtMinimum, match="smallest loss scale, 2"):
        scale.update(overflow=True)


def test_a_fixed_scale_never_moves() -> None:
    scale = LossScale.of(PrecisionSettings(dtype="fp16", loss_scale=128.0))
    assert moves(scale, "xxxx....") == [128] * 8


powers = st.integers(0, 8).map(lambda power: 2.0**power)


@given(
    initial=powers,
    minimum=powers,
    growth_interval=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
    overflows=st.lists(st.booleans(), max_size=60),
)
def test_the_rule_is_that_of_deepspeed(
    initial: float, minimum: float, growth_interval: int, hysteresis: int, overflows: list[bool]
) -> None:
    """The same scale after every step, and the same refusal; so both engines skip the same steps."""
    from deepspeed.runtime.fp16 import loss_scaler

    minimum = min(initial, minimum)
    ours = LossScale(initial, True, growth_interval, hysteresis, minimum)
    theirs = loss_scaler.DynamicLossScaler(
        init_scale=initial,
        scale_window=growth_interval,
        min_scale=minimum,
        delayed_shift=hysteresis,
        consecutive_hysteresis=False,
    )
    with mock.patch.object(loss_scaler.dist, "get_rank", return_value=1):
        for overflow in overflows:
            refusals = []
            for update, refusal in ((ours.update, ScaleAtMinimum), (theirs.update_scale, Exception)):
                try:
                    update(overflow)
                except refusal:
                    refusals.append(update)
            assert len(refusals) in (0, 2)
            assert ours.scale == theirs.cur_scale
            if refusals:
                return


@pytest.mark.parametrize(
    "section",
    [
        {"loss_scale": 0.0},
        {"loss_scale": -1.0},
        {"loss_scale": "static"},
        {"initial_scale": 1000.0},
        {"initial_scale": 0.5},
        {"min_scale": 3.0},
        {"min_scale": 0.0},
        {"growth_interval": 0},
        {"hysteresis": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_scale_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrecisionSettings.model_validate({"dtype": "fp16", **section})


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ({"dtype": "fp16", "initial_scale": 2.0, "min_scale": 4.0}, ["min_scale"]),
        ({"dtype": "fp16", "initial_scale": 4.0, "min_scale": 4.0}, []),
        ({"dtype": "bf16", "loss_scale": 8.0, "hysteresis": 1}, ["loss_scale", "hysteresis"]),
        ({"dtype": "fp16", "loss_scale": 8.0, "growth_interval": 5}, ["growth_interval"]),
        ({"dtype": "fp32", "parameters": "same"}, ["parameters"]),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_named(section: dict[str, Any], keys: list[str]) -> None:
    conflicts = precision.TECHNIQUE.conflicts(setups.setup(precision=section))
    assert [conflict.key.removeprefix("strategy.precision.") for conflict in conflicts] == keys


@pytest.mark.parametrize("max_norm", [None, 1.0, 100.0])
def test_gradients_are_unscaled_before_they_are_clipped(max_norm: float | None) -> None:
    gradients = [torch.tensor([3.0, 0.0]) * 1024, torch.tensor([[4.0]]) * 1024]
    assert precision.unscale_and_clip(gradients, 1024, max_norm) == 5.0
    factor = 1 / 5 if max_norm == 1.0 else 1
    torch.testing.assert_close(gradients, [torch.tensor([3.0, 0.0]) * factor, torch.tensor([[4.0]]) * factor])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_norm_tells_an_overflow(bad: float) -> None:
    assert not math.isfinite(precision.unscale_and_clip([torch.tensor([1.0, bad])], 2.0, 1.0))


def test_masters_give_their_weights_back_and_keep_what_16_bits_cannot() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.5], dtype=torch.bfloat16))
    masters = MasterWeights([{"params": [parameter], "weight_decay": 0.1}])
    (group,) = masters.master_groups
    (master,) = group["params"]
    assert group["weight_decay"] == 0.1
    assert master.dtype == torch.float32
    assert torch.equal(master, parameter.float())
    assert masters.master_of() == {parameter: master}

    masters.give_weights()
    assert parameter.tolist() == [1.0, -2.5]

    parameter.grad = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    masters.take_gradients()
    assert parameter.grad is None
    assert master.grad.dtype == torch.float32
    assert master.grad.tolist() == [0.5, 2.0]

    optimizer = torch.optim.SGD(masters.master_groups, lr=2**-9, weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(8):  # each step is too small for bfloat16 to see
        optimizer.step()
        masters.give_weights()
    assert master.tolist() == [1.0 - 8 * 2**-10, -2.5 - 8 * 2**-8]
    assert torch.equal(parameter, master.bfloat16())


def test_masters_of_parameters_without_gradients_have_none() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    masters = MasterWeights([{"params": [parameter]}])
    masters.take_gradients()
    assert masters.master_of()[parameter].grad is None


def test_autocast_leaves_the_parameters_in_fp32() -> None:
    model = setups.prepare(setups.bert(), precision="bf16")
    outputs = model(input_ids=torch.arange(8).view(2, 4))
    assert outputs.logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_autocast_keeps_no_copy_of_the_weights_until_the_end_of_the_forward_pass() -> None:
    model = setups.prepare(setups.bert(), precision="bf16", activation_checkpointing="full")
    kept: list[bool] = []
    model.classifier.register_forward_pre_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    model(input_ids=torch.arange(8).view(2, 4))
    assert kept == [False], "checkpointing would save the activations and hold all weights a second time"
