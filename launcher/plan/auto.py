"""Which keys of a job file are for the planner to choose, and what may stand in their place."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from memlaunch.launcher.keys import KeyPath, dotted, parse

AUTO = "auto"

ENGINE = "strategy.engine"
STAGE = "strategy.zero.stage"
BUCKET = "strategy.zero.bucket_size"
OPTIMIZER = "strategy.zero.offload_optimizer"
PARAMETERS = "strategy.zero.offload_parameters"
CHECKPOINTING = "strategy.activation_checkpointing.mode"
MICRO_BATCH = "training.micro_batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"

#: Key that may be open -> its values, the simplest first.
CHOICES: dict[str, tuple[Any, ...]] = {
    PARAMETERS: ("none", "cpu"),
    OPTIMIZER: ("none", "cpu"),
    BUCKET: (50_000_000, 5_000_000),
    CHECKPOINTING: ("none", "selective", "full"),
    ENGINE: ("torch", "deepspeed"),
    STAGE: (0, 1, 2, 3),
}
#: Key that may be open, and whose values follow from those of other keys.
SIZES = (MICRO_BATCH, ACCUMULATION)


def opened(value: Mapping[str, Any], shorthands: Mapping[KeyPath, str]) -> frozenset[str]:
    """The keys of a job file that say ``"auto"`` and may.

    Args:
        value: what the file says.
        shorthands: section -> its leading key, where the section may be written as that alone.
    """
    return frozenset(key for key in (*CHOICES, *SIZES) if _says_auto(value, parse(key), shorthands))


def open_keys(found: frozenset[str], value: Mapping[str, Any]) -> frozenset[str]:
    """The keys that the planner chooses: those of :func:`opened`, and what follows from them.

    The accumulation follows from the micro-batch and the micro-batch from it, unless the job fixes them.
    """
    training = value.get("training") or {}
    keys = set(found)
    if MICRO_BATCH in keys and training.get("gradient_accumulation_steps") is None:
        keys.add(ACCUMULATION)
    if ACCUMULATION in keys and training.get("micro_batch_size") is None:
        keys.add(MICRO_BATCH)
    return frozenset(keys)


def stand_ins(found: frozenset[str]) -> Iterator[dict[str, Any]]:
    """What may stand in the place of the keys of :func:`opened`, the simplest first.

    Batch sizes are left out, so that they follow from each other.
    """
    keys = [key for key in CHOICES if key in found]
    sizes = {key: None for key in SIZES if key in found}
    for values in itertools.product(*(CHOICES[key] for key in keys)):
        yield {**dict(zip(keys, values, strict=True)), **sizes}


def _says_auto(value: Any, path: KeyPath, shorthands: Mapping[KeyPath, str]) -> bool:
    for depth, name in enumerate(path):
        if isinstance(value, str):
            return value == AUTO and shorthands.get(path[:depth]) == dotted((name,))
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return bool(value == AUTO)
