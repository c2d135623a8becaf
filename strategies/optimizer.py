"""AdamW with 8-bit or 32-bit state, chosen by module, under every kind of sharding.

8-bit state: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (ICLR 2022), through bitsandbytes.
Its own per-module overrides are keyed by parameter, and ZeRO replaces the parameters of a group by one flat
partition, so they are lost without a word. Here the bits belong to the parameter *group*, which every engine
keeps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from memlaunch.strategies import patterns
from memlaunch.strategies.freezing import base_prefixes, no_match
from memlaunch.strategies.settings import Settings
from memlaunch.strategies.technique import Conflict, Facts, NotApplicable, Setup, Technique

if TYPE_CHECKING:
    import torch

Bits = Literal[8, 32]

#: Tensors with fewer elements keep 32-bit state: quantising them saves nothing and costs accuracy.
MIN_8BIT_ELEMENTS = 4096


class Override(Settings):
    """The bits of optimizer state for some modules."""

    modules: str = Field(description="A module pattern, such as `*embeddings*`.")
    bits: Bits = Field(description="Bits of each state value for the parameters of these modules.")

    @field_validator("modules")
    @classmethod
    def _well_formed(cls, value: str) -> str:
        patterns.check_syntax(value)
        return value


class OptimizerSettings(Settings):
    """The optimizer and the bits of its state."""

    SHORTHAND = "name"

    name: Literal["adamw"] = Field(default="adamw", description="AdamW, Loshchilov & Hutter (ICLR 2019).")
    bits: Bits = Field(default=32, description="Bits of each of the two states of a parameter.")
    overrides: list[Override] = Field(
        default_factory=list, description="Other bits for some modules; the last match holds."
    )


def uses_8bit(settings: OptimizerSettings) -> bool:
    """Whether any state may be held in 8 bits."""
    return settings.bits == 8 or any(override.bits == 8 for override in settings.overrides)


def state_bits(
    settings: OptimizerSettings, shapes: Mapping[str, Sequence[int]], prefixes: Iterable[str] = ()
) -> dict[str, int]:
    """The bits of optimizer state of each parameter.

    Args:
        shapes: parameter name -> shape, for every parameter of the model.
        prefixes: as in :func:`memlaunch.strategies.patterns.select`.

    Raises:
        NotApplicable: an override matches nothing in the model.
    """
    names, roots = list(shapes), tuple(prefixes)
    bits = dict.fromkeys(names, int(settings.bits))
    for index, override in enumerate(settings.overrides):
        covered = patterns.select(override.modules, names, roots)
        if not covered:
            key = f"strategy.optimizer.overrides[{index}].modules"
            raise NotApplicable(key, *no_match(override.modules, names, roots))
        bits |= dict.fromkeys(covered, int(override.bits))
    for name, shape in shapes.items():
        if _is_norm_or_bias(shape) or _elements(shape) < MIN_8BIT_ELEMENTS:
            bits[name] = 32
    return bits


def parameter_groups(model: "torch.nn.Module", setup: Setup) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, one for each pair of (bits, weight decay) that occurs.

    Each group has ``params``, ``names``, ``optim_bits`` and ``weight_decay``. Biases and norms (every
    parameter of fewer than two dimensions) are not decayed. A tied parameter comes once, under its first
    name, and an override of any of its names holds for it.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in every.items()}
    by_name = state_bits(setup.optimizer, shapes, base_prefixes(model))
    bits_of: dict[torch.Tensor, int] = {}
    for name, parameter in every.items():
        if by_name[name] != setup.optimizer.bits or parameter not in bits_of:
            bits_of[parameter] = by_name[name]
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if _is_norm_or_bias(shapes[name]) else setup.weight_decay
        bits = bits_of[parameter]
        empty = {"params": [], "names": [], "optim_bits": bits, "weight_decay": decay}
        group = groups.setdefault((bits, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build(groups: list[dict[str, Any]], setup: Setup) -> "torch.optim.Optimizer":
    """The optimizer over ``groups``, as :func:`parameter_groups` makes them."""
    import torch

    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    options: dict[str, Any] = {"lr": setup.learning_rate, "betas": setup.betas, "eps": setup.eps}
    if uses_8bit(setup.optimizer):
        return _grouped_bits_adamw()(groups, optim_bits=32, min_8bit_size=0, **options)
    # Fused: the foreach implementation holds temporaries as large as the parameters.
    return torch.optim.AdamW(groups, fused=True, **options)


def useless_overrides(model: "torch.nn.Module", settings: OptimizerSettings) -> list[str]:
    """Override patterns that match frozen parameters only."""
    named = dict(model.named_parameters(remove_duplicate=False))
    roots = base_prefixes(model)
    return [
        override.modules
        for override in settings.overrides
        if not any(named[n].requires_grad for n in patterns.select(override.modules, list(named), roots))
    ]


def _grouped_bits_adamw() -> "Callable[..., torch.optim.Optimizer]":
    from bitsandbytes.optim.adamw import AdamW

    class GroupedBitsAdamW(AdamW):
        """AdamW whose state bits are those of the parameter group."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[no-untyped-call]
            config["optim_bits"] = group["optim_bits"]
            return config

    return GroupedBitsAdamW


def _is_norm_or_bias(shape: Sequence[int]) -> bool:
    return len(shape) < 2


def _elements(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _conflicts(setup: Setup) -> Iterable[Conflict]:
    if uses_8bit(setup.optimizer) and setup.zero.offload_optimizer != "none":
        key = "bits" if setup.optimizer.bits == 8 else "overrides"
        yield Conflict(
            f"strategy.optimizer.{key}",
            "8-bit optimizer state cannot be offloaded: "
            "its update on a CPU is slower than the transfer it saves",
            'use 32 bits with offload, or `"offload_optimizer": "none"`',
            ("strategy.zero.offload_optimizer",),
        )


def _deepspeed_config(setup: Setup) -> Mapping[str, Any]:
    # The optimizer is ours, not one that DeepSpeed lists or would compile for offload.
    config: dict[str, Any] = {"zero_allow_untested_optimizer": True}
    if setup.zero.offload_optimizer != "none":
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _verify(setup: Setup, facts: Facts) -> Iterable[str]:
    seen = set()
    if not facts.states:
        yield "no optimizer state was found"
    for bits, elements, dtype in facts.states:
        if elements <= 1 or (bits, dtype) in seen:  # a step counter has no bits to check
            continue
        seen.add((bits, dtype))
        if dtype != {8: "uint8", 32: "float32"}[bits]:
            yield f"a group of {bits}-bit optimizer state holds {dtype}"


TECHNIQUE = Technique(
    name="optimizer", conflicts=_conflicts, deepspeed_config=_deepspeed_config, verify=_verify
)
