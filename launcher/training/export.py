"""The trained model in Hugging Face form: trainable weights from the fp32 masters, frozen ones unchanged."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.world import World
from memlaunch.strategies import lora


class Untouched:
    """What the export must give back as it came: frozen tensors, in the dtype they were stored in.

    Parameters are trained in fp32, which holds 16-bit values exactly, so that casting back restores them.
    Where the run holds parameters in a 16-bit type, fp32 values are lost to it, and copies are kept in host
    memory on the main rank. ``use_cache`` is the model's own setting, which training turns off.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, torch.dtype],
        engine_casts: bool,
        use_cache: bool | None,
        world: World,
    ) -> None:
        self.use_cache = use_cache
        frozen = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self._dtypes = {n: stored.get(lora.plain_name(n), tensor.dtype) for n, tensor in frozen.items()}
        self._copies = (
            {name: tensor.detach().clone() for name, tensor in frozen.items()}
            if engine_casts and world.is_main
            else {}
        )

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` as it is to be saved under ``name``."""
        if name not in self._dtypes:
            return tensor
        return self._copies.get(name, tensor).to(self._dtypes[name])


def stored_dtypes(path: str, revision: str | None, model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Parameter name -> dtype in the weight files of ``path``, a folder or a hub id that has been loaded.

    The files of a base model lack the prefix that the same tensors have inside ``model``. Where there are no
    safetensors, every parameter has the dtype that the model's config tells.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    config = cached_file(path, "config.json", revision=revision)
    files = sorted(Path(config).parent.glob("*.safetensors")) if config is not None else []
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                dtypes[name] = _DTYPES.get(weights.get_slice(name).get_dtype(), torch.float32)
    if not files:
        told = getattr(model.config, "dtype", None)
        return dict.fromkeys(dict(model.named_parameters()), told) if isinstance(told, torch.dtype) else {}
    prefix = model.base_model_prefix
    return dtypes | {f"{prefix}.{name}": dtype for name, dtype in dtypes.items()}


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def save(
    engine: Engine,
    model: nn.Module,
    save_more: Callable[[Path], None],
    untouched: Untouched,
    folder: Path,
    world: World,
) -> None:
    """Write ``folder`` on the main rank, whole or not at all; every rank must take part.

    A model of transformers is saved by itself; any other as ``model.safetensors``, its ``state_dict``.
    Adapters are added to what they adapt, and stand in ``adapter`` alone.

    Args:
        save_more: what else is to be written into the folder that it is given.
    """
    weights: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    identity = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, tensor in engine.weights():
        if world.is_main:
            # Tied parameters stay one tensor, which is how they are recognised when saved.
            kept = gathered.setdefault(identity[name], untouched.restore(name, tensor))
            weights[name] = kept
    if not world.is_main:
        return
    persistent = model.state_dict().keys()
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    config: Any = getattr(model, "config", None)
    if untouched.use_cache is not None:
        config.use_cache = untouched.use_cache
    partial, old = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "old"))
    for rubbish in (partial, old):
        shutil.rmtree(rubbish, ignore_errors=True)
    if adapted := lora.layers(model):
        lora.save_adapter(model, weights, partial / "adapter", getattr(config, "_name_or_path", None))
        weights = lora.merged(adapted, weights)
    if isinstance(model, PreTrainedModel):
        with lora.taken_out(model):
            model.save_pretrained(partial, state_dict=weights | buffers)
        # It has written the type of the parameters in memory, as which the file would then be loaded.
        config.dtype = torch.float32
        config.save_pretrained(partial)
    else:
        partial.mkdir(exist_ok=True)
        # A file holds no tensor under two names. Copies are what `load_state_dict` takes for tied parameters.
        alone = {name: tensor.contiguous().clone() for name, tensor in (weights | buffers).items()}
        save_file(alone, partial / "model.safetensors", metadata={"format": "pt"})
    save_more(partial)
    if folder.exists():  # of a run that went on
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
