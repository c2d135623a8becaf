"""A resolved job as a DeepSpeed config, and under DeepSpeed's launcher.

Of that launcher we use what runs on each machine. What starts it there over ssh is our own: DeepSpeed's has a
shell take values apart, hands on an environment that nobody asked for, loses exit statuses, and runs the
ranks of a single remote host on this machine.
"""

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memlaunch.launcher.translate import hosts, shell
from memlaunch.launcher.translate.shell import Raw
from memlaunch.launcher.translate.torchrun import RANK
from memlaunch.strategies import TECHNIQUES
from memlaunch.strategies.technique import Setup

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob


def config(resolved: "ResolvedJob", *, for_script: bool = False) -> dict[str, Any]:
    """``ds_config.json``: what the techniques need, then the job's own ``strategy.deepspeed`` keys.

    Args:
        for_script: a script drives the engine, and calls its ``step`` behind every micro-batch; our loop does
            so behind a window.
    """
    made = technique_config(resolved.setup(resolved.job.cluster.device))
    if for_script:
        del made["managed_gradient_accumulation"]
    return merge(made, resolved.job.strategy.deepspeed)


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


def files(resolved: "ResolvedJob", python: str) -> dict[str, str]:
    """``command.sh``, ``node.sh`` and, for several hosts, ``hostfile``."""
    if resolved.hosts:
        slots = {host.name: list(host.slots) for host in resolved.hosts}
        return hosts.on_each(resolved, python, _launch(python, slots, Raw('"$1"'), Raw('"$2"'), Raw('"$3"')))
    slots = {"localhost": list(range(resolved.world_size))}
    port = Raw(f'"$({shell.join([python, "-m", "memlaunch.launcher.ports"])})"')
    return hosts.on_this_machine(resolved, python, _launch(python, slots, Raw("0"), Raw("127.0.0.1"), port))


def _launch(python: str, slots: Mapping[str, list[int]], node: Raw, address: Raw, port: Raw) -> list[str]:
    """The ranks of one machine: its number, and where all ranks meet; ``slots``: its GPUs, by host."""
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    return [
        *(python, "-m", "deepspeed.launcher.launch", f"--world_info={world}"),
        *(Raw(f"--node_rank={node}"), Raw(f"--master_addr={address}"), Raw(f"--master_port={port}")),
        *("--no_local_rank", "--module", RANK),
    ]
