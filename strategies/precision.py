"""Mixed precision: 16-bit arithmetic over fp32 master weights, and the loss scale that fp16 needs.

Micikevicius et al., Mixed Precision Training (ICLR 2018). With ``parameters: fp32`` the module keeps its
parameters in fp32 and its forward pass runs under autocast, the same on every engine. With
``parameters: same`` the module holds its parameters and gradients in the 16-bit type, and the optimizer
keeps fp32 masters (sharded under ZeRO).
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from memlaunch.strategies.settings import Settings, changed
from memlaunch.strategies.technique import Conflict, Facts, Setup, Technique

if TYPE_CHECKING:
    import torch

Dtype = Literal["fp32", "fp16", "bf16"]


class PrecisionSettings(Settings):
    """The type of the arithmetic, of the parameters, and the loss scale of fp16."""

    SHORTHAND = "dtype"

    dtype: Dtype = Field(default="fp32", description="The type that matrix products run in.")
    parameters: Literal["fp32", "same"] = Field(
        default="fp32",
        description="`fp32`: parameters in fp32, forward under autocast. `same`: parameters and gradients in "
        "`dtype`, fp32 masters in the optimizer.",
    )
    loss_scale: Literal["dynamic"] | float = Field(
        default="dynamic", description="fp16 only: `dynamic`, or a fixed positive number."
    )
    initial_scale: float = Field(
        default=65536.0, description="Where the dynamic loss scale starts: a power of two."
    )
    growth_interval: int = Field(
        default=1000,
        ge=1,
        description="After this many steps without overflow the next one doubles the scale.",
    )
    hysteresis: int = Field(
        default=2, ge=1, description="Overflows until the scale halves; the first ones only skip their step."
    )
    min_scale: float = Field(
        default=1.0,
        description="The scale never falls below this power of two; an overflow there ends the run.",
    )

    @field_validator("loss_scale")
    @classmethod
    def _positive(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("a fixed loss scale must be greater than 0")
        return value

    @field_validator("initial_scale", "min_scale")
    @classmethod
    def _power_of_two(cls, value: float) -> float:
        if value < 1 or math.frexp(value)[0] != 0.5:
            raise ValueError("must be a power of two, such as 65536")
        return value


class ScaleAtMinimum(RuntimeError):
    """fp16 gradients overflow although the loss scale is already at its minimum."""

    @classmethod
    def at(cls, minimum: float) -> "ScaleAtMinimum":
        """The error at this smallest scale."""
        return cls(f"the gradients overflow at the smallest loss scale, {minimum:g}")


@dataclass
class LossScale:
    """The loss scale of fp16 and how it moves; the same rule as DeepSpeed's ``DynamicLossScaler``.

    An overflow costs one of ``hysteresis`` credits, and halves the scale once one credit is left. After
    ``growth_interval`` steps without overflow the next such step doubles the scale and fills the credits
    again. A fixed scale never moves, but its overflows are skipped all the same.
    """

    scale: float
    dynamic: bool
    growth_interval: int
    hysteresis: int
    min_scale: float

    def __post_init__(self) -> None:
        self.credits = self.hysteresis
        self.clean_steps = 0

    @classmethod
    def of(cls, settings: PrecisionSettings) -> "LossScale":
        """The loss scale at the start of a run."""
        dynamic = settings.loss_scale == "dynamic"
        start = settings.initial_scale if dynamic else float(settings.loss_scale)
        return cls(start, dynamic, settings.growth_interval, settings.hysteresis, settings.min_scale)

    def update(self, overflow: bool) -> None:
        """Move the scale after one optimizer step.

        Raises:
            ScaleAtMinimum: it would have to fall below ``min_scale``.
        """
        if not self.dynamic:
            return
        if overflow:
            self.clean_steps = 0
            if self.credits > 1:
                self.credits -= 1
                return
            if self.scale <= self.min_scale:
                raise ScaleAtMinimum.at(self.min_scale)
            self.scale = max(self.scale / 2, self.min_scale)
            return
        if self.clean_steps and self.clean_steps % self.growth_interval == 0:
            self.scale *= 2
            self.credits = self.hysteresis
        self.clean_steps += 1

    def state(self) -> dict[str, float]:
        """Where it stands: all that :meth:`update` changes."""
        return {"scale": self.scale, "credits": self.credits, "clean_steps": self.clean_steps}

    def set_state(self, state: Mapping[str, float]) -> None:
        """Go on from what :meth:`state` told."""
        self.scale = float(state["scale"])
        self.credits, self.clean_steps = int(state["credits"]), int(state["clean_steps"])


class MasterWeights:
    """fp32 copies of 16-bit parameters, for an optimizer to work on.

    ``groups`` are optimizer groups whose ``params`` are the 16-bit parameters; ``master_groups`` the same
    with fp32 copies in their place.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.master_groups: list[dict[str, Any]] = []
        for group in groups:
            masters = [p.detach().clone().float().requires_grad_() for p in group["params"]]
            self._pairs += zip(group["params"], masters, strict=True)
            self.master_groups.append({**group, "params": masters})

    def take_gradients(self) -> None:
        """Move each parameter's gradient to its master, in fp32."""
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def give_weights(self) -> None:
        """Round each master into its parameter."""
        for parameter, master in self._pairs:
            parameter.data.copy_(master.data)

    def master_of(self) -> "dict[torch.Tensor, torch.Tensor]":
        """Parameter -> master."""
        return dict(self._pairs)


def unscale_and_clip(
    gradients: "list[torch.Tensor]",
    scale: float,
    max_norm: float | None,
    over_ranks: Callable[[float], float] | None = None,
) -> float:
    """Divide ``gradients`` by the loss scale, then clip them to ``max_norm``, in place.

    Args:
        over_ranks: sums a number over the ranks, where each has a part of the gradients.

    Returns their norm in between, that of all parts: not finite where one of them overflowed.
    """
    import torch

    if scale != 1.0:
        torch._foreach_div_(gradients, scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    if over_ranks is not None:
        norm = norm.new_tensor(math.sqrt(over_ranks(float(norm) ** 2)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return float(norm)


def torch_dtype(dtype: Dtype) -> "torch.dtype":
    """``"fp16"`` -> ``torch.float16``, and so on."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def scales_loss(settings: PrecisionSettings) -> bool:
    """Whether the run needs a loss scale."""
    return settings.dtype == "fp16"


def engine_casts(settings: PrecisionSettings) -> bool:
    """Whether the module's parameters are held in the 16-bit type."""
    return settings.dtype != "fp32" and settings.parameters == "same"


def _conflicts(setup: Setup) -> Iterable[Conflict]:
    precision = setup.precision
    if precision.dtype != "fp16":
        for key in changed(
            precision, "loss_scale", "initial_scale", "growth_interval", "hysteresis", "min_scale"
        ):
            yield Conflict(
                f"strategy.precision.{key}",
                f"a loss scale has no meaning in {precision.dtype}",
                'remove it, or set `"dtype": "fp16"`',
                ("strategy.precision.dtype",),
            )
    elif precision.loss_scale != "dynamic":
        for key in changed(precision, "initial_scale", "growth_interval", "hysteresis", "min_scale"):
            yield Conflict(
                f"strategy.precision.{key}",
                "a fixed loss scale does not move",
                'remove it, or set `"loss_scale": "dynamic"`',
                ("strategy.precision.loss_scale",),
            )
    elif precision.initial_scale < precision.min_scale:
        yield Conflict(
            "strategy.precision.min_scale",
            f"the scale starts at {precision.initial_scale:g}, below its minimum {precision.min_scale:g}",
            "raise `initial_scale`, or lower `min_scale`",
            ("strategy.precision.initial_scale",),
        )
    if precision.dtype == "fp32" and precision.parameters != "fp32":
        yield Conflict(
            "strategy.precision.parameters",
            "`same` means 16-bit parameters, and `dtype` is fp32",
            'set `"dtype": "bf16"` or `"fp16"`, or remove `parameters`',
            ("strategy.precision.dtype",),
        )
    if setup.engine != "deepspeed":
        return
    if precision.dtype == "fp16" and setup.device == "cpu":
        yield Conflict(
            "strategy.precision.dtype",
            "DeepSpeed does not train in fp16 on a CPU",
            'use `fp32` or `bf16`, or `"engine": "torch"`',
            ("strategy.engine", "cluster.device"),
        )
    if engine_casts(precision) and setup.zero.stage == 0:
        # Its stage 0 optimizer divides the gradients by a scale that never multiplied the loss.
        yield Conflict(
            "strategy.precision.parameters",
            f"DeepSpeed's ZeRO stage 0 gets {precision.dtype} parameters wrong",
            'use stage 1, or `"parameters": "fp32"`',
            ("strategy.zero.stage", "strategy.engine"),
        )


def _deepspeed_config(setup: Setup) -> Mapping[str, Any]:
    precision = setup.precision
    if not engine_casts(precision):
        return {}  # autocast and its loss scale are set up in the rank, the same for every engine
    if precision.dtype == "bf16":
        return {"bf16": {"enabled": True}}
    section: dict[str, Any] = {"enabled": True}
    if precision.loss_scale == "dynamic":
        section |= {
            "loss_scale": 0,
            "initial_scale_power": round(math.log2(precision.initial_scale)),
            "loss_scale_window": precision.growth_interval,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": int(precision.min_scale),
        }
    else:
        section["loss_scale"] = precision.loss_scale
    return {"fp16": section}


def _prepare_model(model: "torch.nn.Module", setup: Setup) -> None:
    """Run the forward pass under autocast where the parameters stay in fp32."""
    import torch

    if setup.precision.dtype == "fp32" or engine_casts(setup.precision):
        return
    assert setup.device != "auto"
    forward = model.forward
    device, dtype = setup.device, torch_dtype(setup.precision.dtype)

    @functools.wraps(forward)
    def forward_in_16_bit(*args: Any, **kwargs: Any) -> Any:
        # Its cache would hold a 16-bit copy of every weight until the end of the forward pass, also of
        # checkpointed blocks; autograd keeps those that the backward pass needs.
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return forward(*args, **kwargs)

    model.forward = forward_in_16_bit


def _verify(setup: Setup, facts: Facts) -> Iterable[str]:
    held = {dtype for name, dtype in facts.parameter_dtypes.items() if facts.trainable[name]}
    asked = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[
        setup.precision.dtype if engine_casts(setup.precision) else "fp32"
    ]
    if held - {asked, "float32"} or asked not in held:
        yield f"parameters are {', '.join(sorted(held))}, the job says {asked}"
    if scales_loss(setup.precision):
        dynamic = setup.precision.loss_scale == "dynamic"
        if facts.dynamic_loss_scale != dynamic:
            yield f"the loss scale is {'not ' if dynamic else ''}dynamic, the job says otherwise"
        elif not dynamic and facts.loss_scale != setup.precision.loss_scale:
            yield f"the loss scale is {facts.loss_scale}, the job says {setup.precision.loss_scale}"
    elif facts.loss_scale not in (None, 1.0):
        yield f"the loss scale is {facts.loss_scale}, the job has none"


TECHNIQUE = Technique(
    name="precision",
    conflicts=_conflicts,
    deepspeed_config=_deepspeed_config,
    prepare_model=_prepare_model,
    verify=_verify,
)
