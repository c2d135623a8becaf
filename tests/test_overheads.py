"""What memlaunch costs beside the training."""

import resource
import subprocess
import sys

from memlaunch.launcher import node


def test_who_waits_for_a_process_sleeps_until_it_ends() -> None:
    with subprocess.Popen(["sleep", "0.5"]) as process:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        node.wait(process, seconds=60)
        assert process.poll() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before < 8


def test_who_waits_for_a_process_that_goes_on_comes_back() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        node.wait(process, seconds=0.05)
        assert process.poll() is None
        process.kill()


def test_tokens_are_written_and_read_without_pandas() -> None:
    program = """
import sys
from memlaunch.launcher.training.tokens import _column, _views
column = _column([[7], [], [-100, 9]])
assert column.to_pylist() == [[7], [], [-100, 9]]
starts, values = _views(column)
assert starts[:4].tolist() == [0, 1, 1, 3]
assert values[:3].tolist() == [7, -100, 9]
assert _views(_column([[], []]))[1].tolist() == []
print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
