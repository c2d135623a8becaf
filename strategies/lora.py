"""LoRA: small matrices beside frozen weights are trained in their place.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (ICLR 2022), through peft. A layer W becomes
W + alpha / rank x B A, in which W is frozen, B begins as 0, and A and B have ``rank`` rows and columns. They
are kept in fp32. What is saved in the end is W with its adapter added, and the adapter alone.
"""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from memlaunch.strategies import patterns
from memlaunch.strategies.freezing import base_prefixes, keep_statistics, no_match
from memlaunch.strategies.settings import Settings
from memlaunch.strategies.technique import Conflict, Facts, NotApplicable, Setup, Technique

if TYPE_CHECKING:
    from pathlib import Path

    import torch

KEY = "strategy.lora"

#: What stands between the name of a layer and that of its own weight, and in the names of an adapter's.
BASE, ADAPTER = ".base_layer.", ".lora_"
#: How peft calls an adapter that has no name.
NAME = "default"

#: The new parts that transformers puts on a base model for a classification, by their names at the root.
HEADS = ("classifier", "pre_classifier", "classification_head", "score")


def _well_formed(pattern: str) -> str:
    patterns.check_syntax(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(_well_formed)]


class LoraSettings(Settings):
    """Which layers get an adapter, and of what size."""

    rank: int = Field(default=8, ge=1, description="Rows and columns of an adapter's two matrices.")
    alpha: float = Field(default=16, gt=0, description="The adapter counts alpha / rank times.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Of the inputs of an adapter.")
    modules: list[Pattern] | None = Field(
        default=None,
        min_length=1,
        description="Module patterns: every linear layer at or below them gets an adapter, less those that "
        "are frozen or tied. Default: the layers that peft chooses for this architecture.",
    )
    train: list[Pattern] | None = Field(
        default=None,
        description="Module patterns of what is trained itself, beside the adapters; default: the head of a "
        "classification, which is new.",
    )


def trained_in_full(settings: LoraSettings, names: list[str], prefixes: Iterable[str]) -> list[str]:
    """The parameters among ``names`` that are trained themselves.

    Raises:
        NotApplicable: a pattern matches nothing.
    """
    if settings.train is None:
        return [name for name in names if name.split(".", 1)[0] in HEADS]
    found: dict[str, None] = {}
    for index, pattern in enumerate(settings.train):
        covered = patterns.select(pattern, names, prefixes)
        if not covered:
            raise NotApplicable(f"{KEY}.train[{index}]", *no_match(pattern, names, prefixes))
        found |= dict.fromkeys(covered)
    return list(found)


def _prepare_model(model: "torch.nn.Module", setup: Setup) -> None:
    if setup.lora is None:
        return
    import peft

    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    prefixes = base_prefixes(model)
    full = set(trained_in_full(setup.lora, names, prefixes))
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    targets = _targets(model, setup.lora, names, full, frozen)
    config = peft.LoraConfig(
        r=setup.lora.rank,
        lora_alpha=setup.lora.alpha,  # type: ignore[arg-type]  # any number is right
        lora_dropout=setup.lora.dropout,
        target_modules=targets,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # and is then set right
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        hint = f"name layers of the model with `{KEY}.modules`"
        raise NotApplicable(f"{KEY}.modules", str(error).partition(". ")[0], hint) from error
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in full and name not in frozen:
            parameter.requires_grad_(True)
    keep_statistics(model)


def _targets(
    model: "torch.nn.Module", settings: LoraSettings, names: list[str], full: set[str], frozen: set[str]
) -> list[str]:
    """The names of the layers that get an adapter.

    Raises:
        NotApplicable: there is none.
    """
    if settings.modules is None:
        chosen = _usual(model)
    else:
        prefixes = base_prefixes(model)
        chosen = []
        for index, pattern in enumerate(settings.modules):
            covered = set(patterns.select(pattern, names, prefixes))
            if not covered:
                raise NotApplicable(f"{KEY}.modules[{index}]", *no_match(pattern, names, prefixes))
            chosen += [name for name in _linear(model) if f"{name}.weight" in covered]
    tied = _tied(model)
    left = [name for name in dict.fromkeys(chosen) if f"{name}.weight" not in full | frozen | tied]
    if not left:
        hint = "name linear layers that are neither frozen nor trained themselves"
        raise NotApplicable(f"{KEY}.modules", "no linear layer gets an adapter", hint)
    return left


def _usual(model: "torch.nn.Module") -> list[str]:
    """The layers that peft chooses for the model's architecture.

    Raises:
        NotApplicable: it knows none.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in USUAL:
        told = f"peft does not know which layers of `{type(model).__name__}` should get an adapter"
        raise NotApplicable(f"{KEY}.modules", told, "name them: `modules`, a list of module patterns")
    endings = tuple(USUAL[kind])
    return [name for name in _linear(model) if name.split(".")[-1] in endings or name.endswith(endings)]


def _tied(model: "torch.nn.Module") -> set[str]:
    """Parameters with several names: what is added to one of them would change the others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


def _linear(model: "torch.nn.Module") -> list[str]:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D  # a linear layer that is stored the other way round

    return [name for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)]


def layers(model: "torch.nn.Module") -> "dict[str, torch.nn.Module]":
    """Name -> layer, of those that have an adapter."""
    found = {
        name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")
    }
    return {name: model.get_submodule(name) for name in sorted(found)}


def plain_name(name: str) -> str:
    """The name of a parameter in the model without adapters."""
    return name.replace(BASE, ".")


def merged(adapted: "Mapping[str, Any]", weights: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """``weights`` of a model with adapters as those of one without: the adapters are added, in fp32.

    Args:
        adapted: :func:`layers` of the model.
    """
    plain = {plain_name(name): tensor for name, tensor in weights.items() if ADAPTER not in name}
    for name, layer in adapted.items():
        first, second = (weights[f"{name}.lora_{part}.{NAME}.weight"].float() for part in "AB")
        change = layer.scaling[NAME] * (second @ first)
        weight = f"{name}.weight"
        plain[weight] = plain[weight].float() + (change.T if layer.fan_in_fan_out else change)
    return plain


def save_adapter(
    model: "torch.nn.Module", weights: "Mapping[str, torch.Tensor]", folder: "Path", base: str | None
) -> None:
    """Write what was trained alone, as ``peft.PeftModel.from_pretrained`` reads it.

    Args:
        base: what the adapter is one of, as far as that has a name.
    """
    import peft
    from safetensors.torch import save_file

    adapted: dict[str, Any] = layers(model)
    layer = next(iter(adapted.values()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    full = dict.fromkeys(name.rpartition(".")[0] for name in trained if ADAPTER not in name)
    config = peft.LoraConfig(
        r=layer.r[NAME],
        lora_alpha=layer.lora_alpha[NAME],
        target_modules=list(adapted),
        modules_to_save=list(full) or None,
        fan_in_fan_out=layer.fan_in_fan_out,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": weights[name].contiguous() for name in trained
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def taken_out(model: "torch.nn.Module") -> "Iterator[None]":
    """``model`` without its adapters, as far as its modules and their names go."""
    adapted: dict[str, Any] = layers(model)
    for name, layer in adapted.items():
        _put(model, name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in adapted.items():
            _put(model, name, layer)


def _put(model: "torch.nn.Module", name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _conflicts(setup: Setup) -> Iterable[Conflict]:
    if setup.lora is not None and importlib.util.find_spec("peft") is None:
        hint = "install it where the job is started and where it runs: `pip install memlaunch[lora]`"
        yield Conflict(KEY, "the package `peft` is not installed", hint)


def _verify(setup: Setup, facts: Facts) -> Iterable[str]:
    if setup.lora is None:
        return
    adapters = [name for name in facts.trainable if ADAPTER in name]
    if not adapters:
        yield "there is no adapter, the job asks for LoRA"
    if still := [name for name in adapters if not facts.trainable[name]]:
        yield f"the adapter `{still[0]}` is not trained"
    if moved := [name for name in facts.trainable if BASE in name and facts.trainable[name]]:
        yield f"`{moved[0]}` is trained, and has an adapter for that"


TECHNIQUE = Technique(name="lora", conflicts=_conflicts, prepare_model=_prepare_model, verify=_verify)
