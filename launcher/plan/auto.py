"""Which keys of a job file are for the planner to choose."""

from collections.abc import Mapping
from typing import Any

from memlaunch.launcher.keys import KeyPath, dotted
from memlaunch.launcher.plan.search import (
    ACCUMULATION,
    BUCKET,
    CHECKPOINTING,
    ENGINE,
    MICRO_BATCH,
    OPTIMIZER,
    PARAMETERS,
    STAGE,
)

AUTO = "auto"

#: Key that may be ``"auto"`` -> what stands in its place while the rest of the job is checked.
SIMPLEST: dict[str, Any] = {
    ENGINE: "torch",
    STAGE: 0,
    OPTIMIZER: "none",
    PARAMETERS: "none",
    BUCKET: 50_000_000,
    CHECKPOINTING: "none",
    MICRO_BATCH: None,
    ACCUMULATION: None,
}


def opened(value: Mapping[str, Any], shorthands: Mapping[KeyPath, str]) -> dict[str, Any]:
    """The keys of a job file that say ``"auto"``, each with what stands in its place meanwhile.

    Args:
        value: what the file says.
        shorthands: section -> its leading key, where the section may be written as that alone.
    """
    found = {
        key: simple
        for key, simple in SIMPLEST.items()
        if _says_auto(value, tuple(key.split(".")), shorthands)
    }
    zero = value.get("strategy", {}).get("zero", {}) if isinstance(value.get("strategy"), dict) else {}
    if (
        ENGINE in found
        and isinstance(zero, dict)
        and any(zero.get(k) not in (None, 0, "none", AUTO) for k in zero)
    ):
        found[ENGINE] = "deepspeed"
    return found


def open_keys(found: Mapping[str, Any], value: Mapping[str, Any]) -> frozenset[str]:
    """The keys that the planner chooses: those of :func:`opened`, and what follows from them.

    The accumulation follows from the micro-batch, unless the job fixes it.
    """
    training = value.get("training") or {}
    keys = set(found)
    if MICRO_BATCH in keys and training.get("gradient_accumulation_steps") in (None, AUTO):
        keys.add(ACCUMULATION)
    if ACCUMULATION in keys and MICRO_BATCH not in keys and training.get("micro_batch_size") is None:
        keys.add(MICRO_BATCH)
    return frozenset(keys)


def _says_auto(value: Any, path: KeyPath, shorthands: Mapping[KeyPath, str]) -> bool:
    for depth, name in enumerate(path):
        if isinstance(value, str):
            return value == AUTO and shorthands.get(path[:depth]) == dotted((name,))
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return bool(value == AUTO)
