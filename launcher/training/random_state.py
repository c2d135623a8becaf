"""The random states of a rank: Python's, numpy's, and torch's on the CPU and its GPU."""

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from memlaunch.launcher.training.world import World


def capture(world: World) -> tuple[dict[str, Tensor], str]:
    """(tensors, the rest as JSON) of every random state of this rank."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if world.kind == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    return tensors, json.dumps({"python": [version, gauss], "numpy": [position, has_gauss, cached]})


def restore(tensors: Mapping[str, Tensor], rest: str, world: World) -> None:
    """The states that :func:`capture` found; that of a GPU only where there is one, then and now."""
    others = json.loads(rest)
    version, gauss = others["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *others["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if world.kind == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], world.device)


def renew(seed: int) -> None:
    """New states from ``seed``, where no stored ones fit the ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
