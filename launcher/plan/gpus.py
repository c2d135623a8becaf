"""The GPUs that the planner knows, read from ``catalogue.json``."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from memlaunch.launcher.errors import UserError
from memlaunch.launcher.keys import closest

#: What plans call a machine without GPUs.
CPU = "CPU"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, or a rank's share of a machine without; what the figures mean stands in the catalogue.

    Attributes:
        capability: the compute capability, such as 9.0; 0 for a CPU.
        flops: dtype -> floating-point operations a second, dense.
        memory_bandwidth, link, pcie, network: bytes a second.
    """

    name: str
    capability: float
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bandwidth: float
    link: float
    pcie: float
    network: float

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What torch calls it."""
        return "cuda" if self.capability else "cpu"


@functools.cache
def catalogue() -> dict[str, Gpu]:
    """By name, in the order of the catalogue."""
    return {entry["name"]: _gpu(entry) for entry in _entries()}


def find(name: str) -> Gpu:
    """The GPU of that name, however it is written; what the driver calls it will do too.

    Raises:
        UserError: there is none.
    """
    known = {
        _plain(alias): entry["name"] for entry in _entries() for alias in (entry["name"], *entry["aliases"])
    }
    plain = _plain(name)
    found = known.get(plain)
    if found is None:
        close = closest(plain, known)
        hint = f"did you mean `{known[close]}`?" if close else f"known are {', '.join(catalogue())}"
        raise UserError(f"the planner knows no GPU `{name}`", hint)
    return catalogue()[found]


def _entries() -> list[dict[str, Any]]:
    text = files("memlaunch.launcher.plan").joinpath("catalogue.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text)["gpus"]
    return entries


def _plain(name: str) -> str:
    words = re.sub(r"(?i)nvidia|geforce|hbm\d?e?|sxm\d?", "", name)
    return re.sub(r"[^a-z0-9]", "", words.lower())


def _gpu(entry: dict[str, Any]) -> Gpu:
    giga, tera = 1e9, 1e12
    return Gpu(
        name=entry["name"],
        capability=entry["capability"],
        memory_bytes=entry["memory_bytes"],
        flops={dtype: rate * tera for dtype, rate in entry["tflops"].items()},
        memory_bandwidth=entry["memory"] * giga,
        link=entry["link"] * giga,
        pcie=entry["pcie"] * giga,
        network=entry["network"] * giga,
    )
