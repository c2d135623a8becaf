"""Activation checkpointing: keep the inputs of a block, compute its activations again for the backward pass.

Chen et al., Training Deep Nets with Sublinear Memory Cost (2016). Always torch's non-reentrant kind: the
reentrant one loses the gradients of a block whose inputs ask for none. A block that nothing is saved for (a
frozen one behind frozen embeddings) is run as it is, so that it is neither computed twice nor backward.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from memlaunch.strategies import patterns
from memlaunch.strategies.freezing import base_prefixes, no_match
from memlaunch.strategies.settings import Settings, changed
from memlaunch.strategies.technique import Conflict, NotApplicable, Setup, Technique

if TYPE_CHECKING:
    import torch

KEY = "strategy.activation_checkpointing"

#: What surrounds a block when it runs, and when it runs again.
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class CheckpointingSettings(Settings):
    """Which blocks compute their activations twice, and what of them is kept all the same."""

    SHORTHAND = "mode"

    mode: Literal["none", "full", "selective", "auto"] = Field(
        default="none",
        description="`full` keeps a block's inputs only; `selective` keeps the outputs of its matrix "
        "products and attention too, and computes the rest again; `auto`: as much as is needed to fit.",
    )
    every: int = Field(default=1, ge=1, description="Checkpoint every n-th block.")
    blocks: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Module patterns of the blocks, such as `encoder.layer[2:]`; default: the modules that "
        "the model repeats in lists.",
    )

    @field_validator("blocks")
    @classmethod
    def _well_formed(cls, value: list[str] | None) -> list[str] | None:
        for pattern in value or ():
            patterns.check_syntax(pattern)
        return value


def repeated_blocks(model: "torch.nn.Module") -> "list[torch.nn.Module]":
    """The blocks a model repeats: the children of its outermost lists of two or more like modules.

    A list counts when its children are of one class and hold parameters: the layers of an encoder and of a
    decoder, the stages of a CNN.
    """
    from torch.nn import ModuleList, Sequential

    blocks: list[torch.nn.Module] = []

    def search(module: "torch.nn.Module") -> None:
        children = list(module.children())
        if isinstance(module, ModuleList | Sequential) and _alike(children):
            blocks.extend(children)
            return
        for child in children:
            search(child)

    search(model)
    return blocks


def _alike(children: "list[torch.nn.Module]") -> bool:
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and any(True for _ in children[0].children())  # a list of single layers is not a list of blocks
        and all(any(True for _ in child.parameters()) for child in children)
    )


def _prepare_model(model: "torch.nn.Module", setup: Setup) -> None:
    settings = setup.activation_checkpointing
    if settings.mode == "none":
        return
    blocks = repeated_blocks(model) if settings.blocks is None else _named_blocks(model, settings.blocks)
    if not blocks:
        raise NotApplicable(
            KEY,
            f"`{type(model).__name__}` has no repeated blocks to checkpoint",
            'set it to `"none"`, name the blocks with `blocks`, or put them into a `torch.nn.ModuleList`',
        )
    _store_no_keys_and_values(model)
    contexts = _keep_products if settings.mode == "selective" else _keep_nothing
    for block in blocks[:: settings.every]:
        _checkpoint(block, contexts)


def _named_blocks(model: "torch.nn.Module", named: Sequence[str]) -> "list[torch.nn.Module]":
    """The modules that the patterns ``named`` name, less those that lie inside another one.

    Raises:
        NotApplicable: a pattern names no module.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules, prefixes = dict(model.named_modules()), base_prefixes(model)
    found: dict[str, None] = {}
    for index, pattern in enumerate(named):
        names = [n for n in patterns.select_modules(pattern, parameters, prefixes) if n in modules]
        if not names:
            raise NotApplicable(f"{KEY}.blocks[{index}]", *no_match(pattern, parameters, prefixes))
        found |= dict.fromkeys(names)
    outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    return [module for name, module in modules.items() if name in outer]


def _store_no_keys_and_values(model: "torch.nn.Module") -> None:
    """Turn off a language model's cache for generation: a block that runs twice would fill it twice."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _checkpoint(block: "torch.nn.Module", contexts: Callable[[], Contexts]) -> None:
    """Let ``block`` keep only its inputs, wherever autograd would keep more."""
    import torch
    from torch.utils.checkpoint import checkpoint

    forward = block.forward

    def context_fn() -> Contexts:
        first, again = contexts()
        return first, _same_statistics(block, again)

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not (_trainable(block) or _wants_grad((args, kwargs))):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    block.forward = checkpointed


def _trainable(block: "torch.nn.Module") -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _wants_grad(inputs: Any) -> bool:
    import torch
    from torch.utils import _pytree

    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in _pytree.tree_leaves(inputs))


@contextmanager
def _same_statistics(block: "torch.nn.Module", inner: AbstractContextManager[Any]) -> Iterator[None]:
    """``inner``, in which batch norms see a batch again without counting it twice in running statistics."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [(m, m.momentum, m.num_batches_tracked) for m in block.modules() if isinstance(m, _BatchNorm)]
    for norm, _, _ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with inner:
            yield
    finally:
        for norm, momentum, batches in norms:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _keep_nothing() -> Contexts:
    return nullcontext(), nullcontext()


def _keep_products() -> Contexts:
    """Selective checkpointing: the outputs of matrix products, convolutions and attention are kept."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    first, again = create_selective_checkpoint_contexts(_costly_operators())
    return first, again


@functools.cache
def _costly_operators() -> list[Any]:
    import torch

    aten = torch.ops.aten
    names = (
        "mm addmm bmm baddbmm convolution _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"
    )
    return [getattr(aten, name).default for name in names.split() if hasattr(aten, name)]


def _conflicts(setup: Setup) -> Iterable[Conflict]:
    settings = setup.activation_checkpointing
    for key in changed(settings, "every", "blocks") if settings.mode == "none" else ():
        yield Conflict(
            f"{KEY}.{key}",
            "nothing is checkpointed",
            f'set `"mode": "full"` or `"selective"`, or remove `{key}`',
            (f"{KEY}.mode",),
        )


def _deepspeed_config(setup: Setup) -> Mapping[str, Any]:
    if setup.activation_checkpointing.mode != "selective" or setup.zero.stage != 3:
        return {}
    # Its own linear layer adds the bias into the product in place, which spoils the product that is kept.
    return {"zero_optimization": {"memory_efficient_linear": False}}


TECHNIQUE = Technique(
    name="checkpointing",
    conflicts=_conflicts,
    deepspeed_config=_deepspeed_config,
    prepare_model=_prepare_model,
)
