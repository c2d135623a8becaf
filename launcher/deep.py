"""The checks of ``validate --deep``: those that need the model itself, built without its weights."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import model_files
from memlaunch.launcher.checks import check_patterns
from memlaunch.launcher.job import Job, Task
from memlaunch.strategies.checkpointing import KEY as CHECKPOINTING
from memlaunch.strategies.checkpointing import repeated_blocks
from memlaunch.strategies.freezing import base_prefixes
from memlaunch.strategies.technique import Conflict

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CLASSES: dict[Task, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


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
