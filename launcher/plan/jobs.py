"""Variants of a job, as the planner compares them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlaunch.launcher import layout, resolve
from memlaunch.launcher.job import Job
from memlaunch.launcher.resolve import ResolvedJob
from memlaunch.launcher.translate.deepspeed import merge


def resolved_of(values: Mapping[str, Any]) -> ResolvedJob:
    """The job of a ``resolved.json``, which has been checked and whose paths are absolute."""
    job = Job.model_validate(dict(values))
    here = Path("/")
    return resolve.resolve(job, layout.of(job.cluster, here), base=here, name=job.name)


def variant(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with some keys changed: ``changes`` is a part of a job, section by section."""
    return merge(values, changes)
