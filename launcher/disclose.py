"""What of a job may be shown to others: in a report, or to an experiment tracker."""

from collections.abc import Iterator, Mapping
from typing import Any

from memlaunch.launcher.keys import KeyPath, dotted

#: In the place of a value that is nobody's business.
HIDDEN = "(hidden)"


def public(job: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved job without the values of its environment variables, which may be passwords."""
    cluster = job.get("cluster")
    environment = cluster.get("env") if isinstance(cluster, Mapping) else None
    if not isinstance(environment, Mapping):
        return dict(job)
    return {**job, "cluster": {**job["cluster"], "env": dict.fromkeys(environment, HIDDEN)}}


def flat(job: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of everything in a job that is not an object; an empty object is a value."""
    return {dotted(path): value for path, value in _leaves(job, ())}


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield path, value
