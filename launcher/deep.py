"""The checks that need a library: DeepSpeed for keys of its config, the model for ``validate --deep``."""

import contextlib
import difflib
import io
import logging
import os
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import model_files
from memlaunch.launcher.checks import check_patterns
from memlaunch.launcher.job import Job, Task, setup_of
from memlaunch.launcher.keys import KeyPath, dotted
from memlaunch.launcher.translate.deepspeed import merge, technique_config
from memlaunch.strategies.accumulation import Batch
from memlaunch.strategies.checkpointing import KEY as CHECKPOINTING
from memlaunch.strategies.checkpointing import repeated_blocks
from memlaunch.strategies.freezing import base_prefixes
from memlaunch.strategies.technique import Conflict

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CLASSES: dict[Task, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def check_keys(job: Job, base: Path) -> Iterator[Conflict]:
    """What DeepSpeed refuses or passes over of the job's own keys for its config, in a job right so far.

    DeepSpeed is asked itself, and loaded where the job has such keys only.
    """
    raw = job.strategy.deepspeed
    if not raw:
        return
    assert job.strategy.engine == "deepspeed"
    ours = technique_config(setup_of(job, Batch(1, 1, 1), 1, job.cluster.device))
    refused = _refused_part(ours, raw)
    if refused is None and (reason := ask_deepspeed(merge(ours, raw))[0]) is not None:
        refused = (), reason
    if refused is not None:
        path, reason = refused
        hint = "look it up in DeepSpeed's configuration reference"
        yield Conflict(dotted(("strategy", "deepspeed", *path)), f"DeepSpeed refuses it: {reason}", hint)
        return
    for path in ask_deepspeed(merge(ours, raw))[1]:
        message = "DeepSpeed has no such key, and would pass over it without a word"
        hint = "look its spelling up in DeepSpeed's configuration reference"
        yield Conflict(dotted(("strategy", "deepspeed", *path)), message, hint)


def ask_deepspeed(config: Mapping[str, Any]) -> tuple[str | None, list[KeyPath]]:
    """(why DeepSpeed refuses ``config``, or None; the keys that it does not read)."""
    read = _Read(config)
    reason = _refusal(read)
    unread = list(read.unread())
    # What it checks with pydantic is read unseen; there, a key that is not known is refused.
    return reason, [path for path in unread if not (path[1:] and _is_strict(config, path[:-1]))]


def _refused_part(
    ours: Mapping[str, Any], raw: Mapping[str, Any], path: KeyPath = ()
) -> tuple[KeyPath, str] | None:
    """(path, reason) of the smallest part of ``raw`` that DeepSpeed refuses by itself beside ``ours``."""
    for key, value in raw.items():
        here = (*path, key)
        reason = _refusal(_Read(merge(ours, _nested(here, value))))
        if reason is not None:
            is_section = (
                isinstance(value, Mapping) and _refusal(_Read(merge(ours, _nested(here, {})))) is None
            )
            return (_refused_part(ours, value, here) if is_section else None) or (here, reason)
    return None


def _refusal(config: "_Read") -> str | None:
    """Why DeepSpeed refuses ``config``; None where it takes it."""
    from pydantic import ValidationError

    with _quiet_deepspeed():
        from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

        try:
            DeepSpeedConfig(config)
        except ValidationError as error:
            first = error.errors()[0]
            return "it has no such key" if first["type"] == "extra_forbidden" else first["msg"]
        except (AssertionError, DeepSpeedConfigError, ValueError) as error:
            return str(error).partition("\n")[0][:200] or "it does not say why"
        except Exception:  # what it does not check, it stumbles over
            return "it cannot read the value"
    return None


def _is_strict(config: Mapping[str, Any], section: KeyPath) -> bool:
    """Whether DeepSpeed refuses a key of ``section`` that it does not know."""
    return _refusal(_Read(merge(config, _nested((*section, "memlaunch"), None)))) is not None


def _nested(path: KeyPath, value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Nothing of what DeepSpeed prints, and no look for a GPU; as if it had not been there, afterwards."""
    before, level = os.environ.get("DS_ACCELERATOR"), logging.root.manager.disable
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        del os.environ["DS_ACCELERATOR"]
        if before is not None:
            os.environ["DS_ACCELERATOR"] = before


class _Read(dict[str, Any]):
    """A config that knows which of its keys were read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({k: _Read(v) if isinstance(v, Mapping) else v for k, v in config.items()})
        self._read: set[str] = set()

    def unread(self, path: KeyPath = ()) -> Iterator[KeyPath]:
        """The paths of the others; a section that was not read stands for all in it."""
        for key, value in dict.items(self):
            if key not in self._read:
                yield (*path, key)
            elif isinstance(value, _Read):
                yield from value.unread((*path, key))

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._read.update(dict.keys(self))
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def __copy__(self) -> "_Read":
        return self  # DeepSpeed reads a copy; what it reads there counts


def check(job: Job, base: Path) -> Iterator[Conflict]:
    """What in a job that is right so far does not fit its model.

    Builds the model on torch's meta device: its config is read, downloaded for a Hugging Face id, and its
    weights are not.
    """
    key = "model.path" if job.model.path is not None else "model.architecture"
    if job.model.architecture is not None and (unknown := _unknown(job.model.architecture)) is not None:
        yield unknown
        return
    try:
        model = _build(job, base)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        hint = "check its spelling, and that this machine can reach it"
        if key == "model.architecture":
            hint = "look at the keys of `model.config`"
        yield Conflict(key, f"transformers cannot build it: {reason}", hint, ("model.config",))
        return
    names = tuple(name for name, _ in model.named_parameters(remove_duplicate=False))
    yield from check_patterns(job, model_files.Parameters(names, names, base_prefixes(model)))
    if job.strategy.activation_checkpointing.mode != "none" and not repeated_blocks(model):
        message = f"`{type(model).__name__}` has no repeated blocks to checkpoint"
        yield Conflict(CHECKPOINTING, message, 'set it to `"none"`', (key,))


def _build(job: Job, base: Path) -> "PreTrainedModel":
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = _config(job, base)
    if job.model.num_labels is not None:
        config.num_labels = job.model.num_labels
    auto: Any = getattr(transformers, _CLASSES[job.model.task])
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=job.model.trust_remote_code)
    return model


def _config(job: Job, base: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    model = job.model
    config: PretrainedConfig
    if model.architecture is not None:
        config = AutoConfig.for_model(model.architecture, **model.config)
        return config
    assert model.path is not None, "a job has one of the two"
    source = model_files.locate(model.path, base) or model.path
    config = AutoConfig.from_pretrained(
        source, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return config


def _unknown(architecture: str) -> Conflict | None:
    """The conflict of an architecture that transformers does not have."""
    from transformers import CONFIG_MAPPING

    known = list(CONFIG_MAPPING.keys())
    if architecture in known:
        return None
    close = difflib.get_close_matches(architecture, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "use a model type of transformers, such as `bert`"
    return Conflict("model.architecture", f"transformers has no architecture `{architecture}`", hint)
