"""The job's model and tokenizer."""

import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from memlaunch.launcher import model_files
from memlaunch.launcher.keys import closest
from memlaunch.launcher.paths import BadPath
from memlaunch.launcher.training.errors import JobMismatch, NotApplicable
from memlaunch.launcher.training.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from memlaunch.launcher.job import ModelSection


def locate(path: str) -> str:
    """A folder for ``package:NAME/FOLDER``; any other path or hub id as it is.

    Raises:
        JobMismatch: the package is not installed, or has no such folder.
    """
    try:
        found = model_files.locate(path, Path.cwd())
    except BadPath as error:
        raise JobMismatch("model.path", str(error), error.hint) from error
    return path if found is None else str(found)


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


def build(
    model: "ModelSection",
    labels: list[str] | None,
    pad_token: int,
    seed: int,
    changes: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """The model in fp32 on the CPU, with new parts (or all of it) from ``seed``.

    An architecture that has no ``sdpa`` gets ``eager`` attention in its place, as its config then says.

    Args:
        labels: the names of the classes, for a task that has some.
        pad_token: the id that batches are padded with.
        changes: where given, no weights are read: the model is made from its config with these keys changed.

    Raises:
        JobMismatch: it cannot be loaded, or ``config`` has a key that its architecture does not know.
    """
    auto = getattr(transformers, TASKS[model.task].auto_class)
    config = load_config(model)
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    config.pad_token_id = pad_token  # classifiers on decoders find the last token by it
    for key, value in (changes or {}).items():
        setattr(config, key, value)

    def made(attention: str) -> "PreTrainedModel":
        torch.manual_seed(seed)
        common = {
            "dtype": torch.float32,
            "attn_implementation": attention,
            "trust_remote_code": model.trust_remote_code,
        }
        found: PreTrainedModel
        if model.path is None or changes is not None:
            found = auto.from_config(config, **common)
        else:
            found = auto.from_pretrained(locate(model.path), config=config, revision=model.revision, **common)
        return found

    def load() -> "PreTrainedModel":
        try:
            return made(model.attention)
        except ValueError as error:
            if model.attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            return made("eager")  # all that this architecture has

    key = "model.config" if model.path is None else "model.path"
    built: PreTrainedModel = _loaded(key, model.path or f"a new {model.architecture}", load)
    if model.task == "seq2seq-lm" and getattr(built.config, "decoder_start_token_id", None) is None:
        # Newer transformers keep it among the settings of generation; where it is unknown, T5's is usual.
        told = getattr(built.generation_config, "decoder_start_token_id", None)
        built.config.decoder_start_token_id = pad_token if told is None else told
    return built


@torch.no_grad()
def check_attention(model: "PreTrainedModel", attention: str, packed: bool) -> None:
    """See by a trial on the CPU that no token of a causal language model attends to what it must not.

    That is the tokens behind it, and other samples of its row where samples are ``packed``. Flash attention
    needs a GPU and is not tried. ``use_cache`` must be off: with a cache, models do not look for packed
    samples.

    Raises:
        NotApplicable: a token sees one that it is to predict, or another sample.
    """
    if attention not in ("eager", "sdpa"):
        return
    vocabulary = next(model.get_input_embeddings().parameters()).shape[0]
    ids = torch.tensor([[3, 5, 7, 11, 13]]) % vocabulary
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    was_training = model.training
    model.eval()
    causal = _close(model(input_ids=ids).logits[:, :-1], model(input_ids=other).logits[:, :-1])
    apart = not packed or _keeps_apart(model, ids)
    model.train(was_training)
    if not causal:
        raise NotApplicable(
            "model.task",
            f"`{type(model).__name__}` sees the tokens that it is to predict",
            "use a decoder; a config of some encoders has `is_decoder` for that",
        )
    if not apart:
        raise NotApplicable(
            "data.batching",
            f"`{type(model).__name__}` lets samples packed into one row see each other",
            "use `bucketed` batches with this model",
        )


def _keeps_apart(model: "PreTrainedModel", ids: torch.Tensor) -> bool:
    """Whether the last three of five tokens come out as they do alone, told so by their positions."""
    try:
        packed = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]])).logits[:, 2:]
        alone = model(input_ids=ids[:, 2:], position_ids=torch.tensor([[0, 1, 2]])).logits
    except TypeError:
        return False  # its forward takes no positions
    return _close(packed, alone)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4, rtol=1e-4)


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
        if key not in known and not _reads(default, key):
            raise JobMismatch(
                f"model.config.{key}",
                f"`{key}` is not in the config of `{model.architecture}`",
                _did_you_mean(key, known),
            )
    config: PretrainedConfig = transformers.AutoConfig.for_model(model.architecture, **model.config)
    return config


def _reads(config: "PretrainedConfig", key: str) -> bool:
    """Whether the code of the architecture asks its config for ``key``, which has no default there."""
    asked = re.compile(rf"config\.{re.escape(key)}\b|[\"']{re.escape(key)}[\"']")
    package = type(config).__module__.rpartition(".")[0]
    for found in importlib.resources.files(package).iterdir():
        if found.name.startswith("modeling_") and asked.search(found.read_text()):
            return True
    return False


def _loaded(key: str, source: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "couldn't connect" in str(error) or "offline mode" in str(error).lower():
            raise JobMismatch(
                key,
                f"`{source}` is not on this machine, and the Hugging Face hub cannot be reached",
                f"fetch it where there is a network (`hf download {source}`), or name a folder that holds it",
            ) from error
        if "ignore_mismatched_sizes" in str(error):
            key, first = "model.num_labels", "its tensors have other sizes than this task's"
        raise JobMismatch(
            key, f"`{source}` cannot be loaded: {first}", "look into the log of rank 0"
        ) from error


def _did_you_mean(name: str, known: list[str]) -> str:
    close = closest(name, known)
    return f"did you mean `{close}`?" if close else "look the name up in the documentation of transformers"


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, in elements, tied ones counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
