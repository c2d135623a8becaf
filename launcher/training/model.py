"""The job's model and tokenizer."""

import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from memlaunch.launcher.training.errors import JobMismatch, NotApplicable
from memlaunch.launcher.training.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from memlaunch.launcher.job import ModelSection

PACKAGE = "package:"


def locate(path: str) -> str:
    """A folder for ``package:NAME/FOLDER``; any other path or hub id as it is.

    Raises:
        JobMismatch: the package is not installed, or has no such folder.
    """
    if not path.startswith(PACKAGE):
        return path
    package, _, folder = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)
    for root in spec.submodule_search_locations or () if spec else ():
        if (found := Path(root, folder)).is_dir():
            return str(found)
    raise JobMismatch(
        "model.path", f"no installed package has the folder `{path}`", f"install `{package}`, or use a path"
    )


def load_tokenizer(model: "ModelSection") -> "PreTrainedTokenizerBase":
    """The tokenizer that ``model.tokenizer`` names, else that of ``model.path``.

    Raises:
        JobMismatch: it cannot be loaded.
    """
    key = "model.tokenizer" if model.tokenizer else "model.path"
    source = model.tokenizer or model.path
    assert source is not None, "the job file requires one of the two"
    loaded: PreTrainedTokenizerBase = _loaded(
        key,
        source,
        lambda: transformers.AutoTokenizer.from_pretrained(
            locate(source),
            revision=model.revision if key == "model.path" else None,
            trust_remote_code=model.trust_remote_code,
        ),
    )
    return loaded


def build(model: "ModelSection", labels: list[str] | None, pad_token: int, seed: int) -> "PreTrainedModel":
    """The model in fp32 on the CPU, with new parts (or all of it) from ``seed``.

    Args:
        labels: the names of the classes, for a task that has some.
        pad_token: the id that batches are padded with.

    Raises:
        JobMismatch: it cannot be loaded, or ``config`` has a key that its architecture does not know.
    """
    auto = getattr(transformers, TASKS[model.task].auto_class)
    config = load_config(model)
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token
    torch.manual_seed(seed)
    built: PreTrainedModel
    if model.path is None:
        built = _loaded(
            "model.config",
            f"a new {model.architecture}",
            lambda: auto.from_config(config, attn_implementation=model.attention, dtype=torch.float32),
        )
    else:
        path = model.path
        built = _loaded(
            "model.path",
            path,
            lambda: auto.from_pretrained(
                locate(path),
                config=config,
                revision=model.revision,
                dtype=torch.float32,
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
            ),
        )
    return built


@torch.no_grad()
def check_packing(model: "PreTrainedModel", attention: str) -> None:
    """See that samples packed into one row do not attend to each other, by a trial on the CPU.

    Flash attention, which needs a GPU, is taken at its word. ``use_cache`` must be off: with a cache, models
    do not look for packed samples.

    Raises:
        NotApplicable: the model makes no difference between packed samples.
    """
    if attention not in ("eager", "sdpa"):
        return
    ids = torch.tensor([[3, 5, 7, 11, 13]])
    ids = ids % next(model.get_input_embeddings().parameters()).shape[0]
    was_training = model.training
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]])).logits[:, 2:]
        alone = model(input_ids=ids[:, 2:], position_ids=torch.tensor([[0, 1, 2]])).logits
        apart = torch.allclose(packed, alone, atol=1e-4, rtol=1e-4)
    except TypeError:
        apart = False  # its forward takes no positions
    model.train(was_training)
    if not apart:
        raise NotApplicable(
            "data.batching",
            f"`{type(model).__name__}` lets samples packed into one row see each other",
            "use `bucketed` batches with this model",
        )


def load_config(model: "ModelSection") -> "PretrainedConfig":
    """The transformers config of the model.

    Raises:
        JobMismatch: as :func:`build`.
    """
    if model.path is not None:
        path = model.path
        stored: PretrainedConfig = _loaded(
            "model.path",
            path,
            lambda: transformers.AutoConfig.from_pretrained(
                locate(path), revision=model.revision, trust_remote_code=model.trust_remote_code
            ),
        )
        return stored
    assert model.architecture is not None, "the job file requires path or architecture"
    try:
        default: PretrainedConfig = transformers.AutoConfig.for_model(model.architecture)
    except ValueError as error:
        known = list(transformers.CONFIG_MAPPING)
        raise JobMismatch(
            "model.architecture",
            f"transformers has no architecture `{model.architecture}`",
            _did_you_mean(model.architecture, known),
        ) from error
    known = [*default.to_dict(), *getattr(default, "attribute_map", {})]
    for key in model.config:
        if key not in known:
            raise JobMismatch(
                f"model.config.{key}",
                f"`{key}` is not in the config of `{model.architecture}`",
                _did_you_mean(key, known),
            )
    config: PretrainedConfig = transformers.AutoConfig.for_model(model.architecture, **model.config)
    return config


def _loaded(key: str, source: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise JobMismatch(
            key, f"`{source}` cannot be loaded: {first}", "look into the log of rank 0"
        ) from error


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{close[0]}`?" if close else "look the name up in the documentation of transformers"


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, in elements, tied ones counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
