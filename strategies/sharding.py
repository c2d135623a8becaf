"""ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) sharded over the ranks, and offload.

Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (SC 2020).
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from memlaunch.strategies.settings import Settings, changed
from memlaunch.strategies.technique import Conflict, Facts, Setup, Technique

ZeroStage = Literal[0, 1, 2, 3, "auto"]
Offload = Literal["none", "cpu", "auto"]


class ZeroSettings(Settings):
    """What is sharded over the ranks, and what lives in host memory."""

    stage: ZeroStage = Field(
        default=0,
        description="0: nothing, 1: optimizer state, 2: and gradients, 3: and parameters; `auto`: the "
        "fastest that fits. The torch engine has no 1; at 2 and 3 it is FSDP2, which at 2 gathers and "
        "reduces once an optimizer step, so that gradients are whole between its micro-batches.",
    )
    offload_optimizer: Offload = Field(
        default="none",
        description="`cpu` keeps optimizer state in host memory and updates it there; `auto`: where nothing "
        "else fits.",
    )
    offload_parameters: Offload = Field(
        default="none",
        description="`cpu` keeps the sharded parameters of stage 3 in host memory, in the torch engine "
        "only together with optimizer state; `auto`: where nothing else fits.",
    )
    bucket_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=50_000_000,
        description="Elements of a communication bucket of DeepSpeed; a buffer of this size is part of the "
        "peak. `auto`: smaller where nothing else fits.",
    )


def _conflicts(setup: Setup) -> Iterable[Conflict]:
    zero = setup.zero
    if not zero.stage and changed(zero, "bucket_size"):
        yield Conflict(
            "strategy.zero.bucket_size",
            "nothing is sharded, so there are no buckets",
            "remove it, or set a ZeRO `stage`",
            ("strategy.zero.stage",),
        )
    if setup.engine == "torch":
        yield from _conflicts_of_fsdp(setup)
    if zero.offload_optimizer != "none" and zero.stage == 0:
        yield Conflict(
            "strategy.zero.offload_optimizer",
            "there is no sharded optimizer state to offload at ZeRO stage 0",
            "use stage 1, 2 or 3",
            ("strategy.zero.stage",),
        )
    if zero.offload_parameters != "none" and zero.stage != 3:
        yield Conflict(
            "strategy.zero.offload_parameters",
            f"parameters can be offloaded at ZeRO stage 3 only, not at stage {zero.stage}",
            "use stage 3, or offload the optimizer alone",
            ("strategy.zero.stage",),
        )


def _conflicts_of_fsdp(setup: Setup) -> Iterable[Conflict]:
    """What DeepSpeed shards or offloads and PyTorch does not."""
    zero = setup.zero
    if zero.stage == 1:
        yield Conflict(
            "strategy.zero.stage",
            "the torch engine has no ZeRO stage 1",
            'use stage 2, which shards the gradients too, or `"engine": "deepspeed"`',
            ("strategy.engine",),
        )
    if zero.stage and changed(zero, "bucket_size"):
        yield Conflict(
            "strategy.zero.bucket_size",
            "the torch engine sends a block of the model at a time, and has no buckets",
            'remove it, or set `"engine": "deepspeed"`',
            ("strategy.engine",),
        )
    if zero.stage == 3 and zero.offload_optimizer != zero.offload_parameters:
        offloaded, other = "offload_optimizer", "offload_parameters"
        if zero.offload_optimizer == "none":
            offloaded, other = other, offloaded
        yield Conflict(
            f"strategy.zero.{offloaded}",
            "the torch engine offloads the parameters of stage 3 and their optimizer state together",
            f'set `"{other}": "cpu"` too, or `"engine": "deepspeed"`',
            (f"strategy.zero.{other}", "strategy.engine"),
        )


def _deepspeed_config(setup: Setup) -> Mapping[str, Any]:
    zero = setup.zero
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage:
        section["reduce_bucket_size"] = zero.bucket_size
        section["allgather_bucket_size"] = zero.bucket_size
    if zero.stage == 3:
        section["stage3_prefetch_bucket_size"] = zero.bucket_size
    if zero.offload_optimizer != "none":
        section["offload_optimizer"] = {"device": zero.offload_optimizer}
    if zero.offload_parameters != "none":
        section["offload_param"] = {"device": zero.offload_parameters}
    return {"zero_optimization": section}


def _verify(setup: Setup, facts: Facts) -> Iterable[str]:
    for key in ("stage", "offload_optimizer", "offload_parameters"):
        asked = getattr(setup.zero, key)
        held = facts.zero_stage if key == "stage" else getattr(facts, key)
        if held != asked:
            yield f"zero.{key} is {held}, the job says {asked}"


TECHNIQUE = Technique(
    name="sharding", conflicts=_conflicts, deepspeed_config=_deepspeed_config, verify=_verify
)
