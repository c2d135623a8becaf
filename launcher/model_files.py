"""What is known of a model without torch: where it is, its config, and the names of its parameters."""

import importlib.util
import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaunch.launcher.keys import closest
from memlaunch.launcher.paths import BadPath, beside, kind

PACKAGE = "package:"

#: Modules that a task puts on a base model; their weights need not be in its file.
HEADS = (
    "classifier.weight",
    "classifier.dense.weight",
    "classifier.out_proj.weight",
    "pre_classifier.weight",
    "classification_head.weight",
    "score.weight",
    "lm_head.weight",
    "lm_head.bias",
    "lm_head.dense.weight",
    "lm_head.layer_norm.weight",
    "cls.predictions.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.LayerNorm.weight",
    "vocab_transform.weight",
    "vocab_layer_norm.weight",
    "vocab_projector.weight",
    "pooler.dense.weight",
)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
#: Models whose first position is behind that of padding.
_PADDING_FIRST = (
    "camembert",
    "data2vec-text",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
#: A header of more bytes is no header.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model as its weight files name them.

    Attributes:
        stored: the names in the files.
        names: every name that they may have once the model is built for its task.
        prefixes: names that the base model may have inside the model.
    """

    stored: tuple[str, ...]
    names: tuple[str, ...]
    prefixes: tuple[str, ...]


def locate(path: str, base: Path = Path()) -> Path | None:
    """The folder that ``path`` of a job file names, or None for a Hugging Face id.

    ``package:NAME/FOLDER`` is a folder inside an installed package, which is not imported.

    Raises:
        BadPath: there is no such folder, and ``path`` cannot be an id.
    """
    if path.startswith(PACKAGE):
        return _in_package(path.removeprefix(PACKAGE))
    folder = beside(path, base)
    found = kind(folder)
    if found == "folder":
        return folder
    if found == "file":
        raise BadPath(f"`{path}` is a file, not a folder", "give the folder that holds `config.json`")
    in_a_folder_here = "/" in path and kind(base / path.split("/", 1)[0]) == "folder"
    if path.startswith((".", "/", "~")) or in_a_folder_here or not _HUB_ID.fullmatch(path):
        raise BadPath(f"there is no folder `{path}`", _folders_near(path, folder))
    return None


def to_fetch(path: str | None) -> str | None:
    """What to tell of a Hugging Face id that is not in the cache of this machine; None of any other model.

    ``path`` is that of a resolved job: a folder is absolute. Nothing is asked of the network.
    """
    if path is None or path.startswith((PACKAGE, "/")):
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache, "hub")
    if (Path(hub).expanduser() / f"models--{path.replace('/', '--')}" / "snapshots").is_dir():
        return None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"warning: `{path}` is not on this machine, and HF_HUB_OFFLINE keeps it from being fetched"
    return f"`{path}` is not on this machine yet: the first start fetches it from the Hugging Face hub"


def check_model(folder: Path) -> None:
    """Raise BadPath where ``folder`` has no config or no weights."""
    read_config(folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise BadPath(
            "has a config but no weights",
            "a model folder holds `model.safetensors`, or pieces of it with `model.safetensors.index.json`",
        )


def check_tokenizer(folder: Path) -> None:
    """Raise BadPath where ``folder`` holds no tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise BadPath("holds no tokenizer", "name a tokenizer with `model.tokenizer`")


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        BadPath: it is not there, or is not the config of a transformers model.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise BadPath("holds no model: there is no `config.json` in it", _models_below(folder)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadPath(
            f"has a `config.json` that cannot be read: {error}", "download the model again"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadPath("has a `config.json` without a `model_type`", "give a model that transformers can load")
    return config


def max_length(tokenizer: Path) -> int | None:
    """The longest sample in tokens that the tokenizer in the folder takes; None where it does not say."""
    try:
        limit = json.loads((tokenizer / "tokenizer_config.json").read_bytes()).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        return None
    return limit if isinstance(limit, int) and 0 < limit < 1_000_000 else None


def positions(folder: Path) -> int | None:
    """How many positions the model in the folder has, where its config says so."""
    config = read_config(folder)
    found = config.get("max_position_embeddings")
    if config["model_type"] in _PADDING_FIRST:
        padding = config.get("pad_token_id", 1)
        found = found - padding - 1 if isinstance(found, int) and isinstance(padding, int) else None
    return found if isinstance(found, int) and found > 0 else None


def parameters(folder: Path) -> Parameters | None:
    """The parameters in the folder's safetensors; None where they are in files that need torch.

    Raises:
        BadPath: a file is not what its name says.
    """
    index = folder / "model.safetensors.index.json"
    try:
        if (folder / "model.safetensors").is_file():
            stored = _header(folder / "model.safetensors")
        elif index.is_file():
            stored = list(json.loads(index.read_bytes())["weight_map"])
        else:
            return None
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        raise BadPath(
            "has weights that are not safetensors",
            "download the model again, with `git lfs` if it is a clone",
        ) from None
    return named(stored, str(read_config(folder)["model_type"]))


def named(stored: Sequence[str], model_type: str) -> Parameters:
    """What the parameters ``stored`` in a file may be called in a model of ``model_type``.

    A file of a base model has ``encoder...``, the model for a task ``bert.encoder...`` and a head.
    """
    prefixes = tuple(dict.fromkeys((model_type, re.split(r"[-_]", model_type)[0], "model", "transformer")))
    tops = {name.split(".", 1)[0] for name in stored}
    inside = (
        () if tops & set(prefixes) else tuple(f"{prefix}.{name}" for prefix in prefixes for name in stored)
    )
    heads = tuple(name for name in HEADS if name not in stored)
    return Parameters(tuple(stored), (*stored, *inside, *heads), prefixes)


def _in_package(path: str) -> Path:
    package, _, folder = path.partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        install = package.replace("_", "-")
        raise BadPath(
            f"the package `{package}` is not installed", f"install it, such as `pip install {install}`"
        )
    roots = [Path(root) for root in spec.submodule_search_locations]
    for root in roots:
        inside = Path(os.path.realpath(root / folder))
        if kind(inside) == "folder" and inside.is_relative_to(root.resolve()):
            return inside
    holds = sorted({p.parent.relative_to(r).as_posix() for r in roots for p in r.glob("**/config.json")})
    some = f"it holds {', '.join(f'`{name}`' for name in holds[:3])}" if holds else "it holds no model"
    raise BadPath(f"the package `{package}` has no folder `{folder}`", some)


def _folders_near(path: str, folder: Path) -> str:
    others = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
    if close := closest(folder.name, others):
        return f"did you mean `{Path(path).with_name(close)}`?"
    return "give a folder, a Hugging Face id, or `package:NAME/FOLDER`"


def _models_below(folder: Path) -> str:
    below = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if below:
        return f"there is one in `{below[0]}`"
    return "give the folder that `save_pretrained` wrote"


def _header(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER:
            raise ValueError("too long a header")
        header = json.loads(stream.read(length))
    return [name for name in header if name != "__metadata__"]
