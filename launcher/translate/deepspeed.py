"""A resolved job as a DeepSpeed config."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memlaunch.strategies import TECHNIQUES
from memlaunch.strategies.technique import Setup

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob


def config(resolved: "ResolvedJob") -> dict[str, Any]:
    """``ds_config.json``: what the techniques need, then the job's own ``strategy.deepspeed`` keys."""
    strategy = resolved.job.strategy
    return merge(technique_config(resolved.setup(resolved.job.cluster.device)), strategy.deepspeed)


def technique_config(setup: Setup) -> dict[str, Any]:
    """The part of the config that follows from the techniques."""
    merged: dict[str, Any] = {}
    for technique in TECHNIQUES:
        merged = merge(merged, technique.deepspeed_config(setup))
    return merged


def merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``more`` added, section by section; ``more`` wins."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
