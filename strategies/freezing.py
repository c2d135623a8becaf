"""Freezing: parameters that keep the values they came with.

A frozen parameter has no gradient, no optimizer state and no weight decay. Where everything before a block is
frozen too (embeddings and first layers), nothing asks for a gradient there, so autograd records nothing and
activation checkpointing leaves those blocks alone. A frozen batch norm keeps its running statistics, and uses
them.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from memlaunch.strategies import patterns
from memlaunch.strategies.technique import Facts, NotApplicable, Setup, Technique

if TYPE_CHECKING:
    import torch

KEY = "strategy.freeze"


def frozen_names(
    freeze: Sequence[str], parameters: Sequence[str], base_prefixes: Iterable[str] = ()
) -> set[str]:
    """The parameter names that the patterns ``freeze`` cover.

    Raises:
        NotApplicable: a pattern matches nothing, or everything is frozen.
    """
    prefixes = tuple(base_prefixes)
    frozen: set[str] = set()
    for index, pattern in enumerate(freeze):
        covered = patterns.select(pattern, parameters, prefixes)
        if not covered:
            raise NotApplicable(f"{KEY}[{index}]", *no_match(pattern, parameters, prefixes))
        frozen.update(covered)
    if frozen and len(frozen) == len(set(parameters)):
        raise NotApplicable(
            KEY, "every parameter of the model is frozen", "leave at least one module out of `freeze`"
        )
    return frozen


def no_match(pattern: str, parameters: Sequence[str], base_prefixes: Iterable[str]) -> tuple[str, str]:
    """Message and hint for a pattern that matches nothing in the model."""
    close = patterns.nearest(pattern, parameters, base_prefixes)
    if close:
        hint = "the nearest modules are " + ", ".join(f"`{name}`" for name in close)
    else:
        top = dict.fromkeys(name.split(".", 1)[0] for name in parameters)
        hint = "the model's modules are " + ", ".join(f"`{name}`" for name in list(top)[:6])
    return f"`{pattern}` matches no module of the model", hint


def base_prefixes(model: "torch.nn.Module") -> tuple[str, ...]:
    """Where the base model stands inside ``model``: ``("bert",)``; empty where it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    return (prefix,) if isinstance(prefix, str) and prefix and hasattr(model, prefix) else ()


def _prepare_model(model: "torch.nn.Module", setup: Setup) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in frozen_names(setup.freeze, list(named), base_prefixes(model)):
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise NotApplicable(
            KEY,
            "every parameter of the model is frozen, tied ones included",
            "leave at least one module out of `freeze`",
        )
    keep_statistics(model)


def keep_statistics(model: "torch.nn.Module") -> None:
    """Let frozen batch norms use the running statistics that they came with, in training too."""
    from torch.nn.modules.batchnorm import _NormBase

    for module in model.modules():
        own = list(module.parameters()) if isinstance(module, _NormBase) else []
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
            module.train = functools.partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: "torch.nn.Module", mode: bool = True) -> "torch.nn.Module":
    return module


def _verify(setup: Setup, facts: Facts) -> Iterable[str]:
    names = list(facts.trainable)
    roots = dict.fromkeys(name.split(".", 1)[0] for name in names)
    for pattern in setup.freeze:
        # Which root is the base model the names don't tell: below that one, everything it covers is frozen.
        # A pattern that covers only other names of tied parameters is not among these names at all.
        covered = [found for root in ("", *roots) if (found := patterns.select(pattern, names, [root]))]
        trained = [[name for name in found if facts.trainable[name]] for found in covered]
        if trained and all(trained):
            yield f"`{trained[0][0]}` is trained, `{pattern}` in the job freezes it"


TECHNIQUE = Technique(name="freezing", prepare_model=_prepare_model, verify=_verify)
