"""The cluster that the tests of this folder share."""

import os
from collections.abc import Iterator

import pytest

from memlaunch.deploy.testbed import Cluster, missing


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: needs a test cluster, and so root on Linux and its packages")


@pytest.fixture(scope="session")
def machine() -> None:
    """A machine that can have a test cluster; with MEMLAUNCH_REQUIRE_CLUSTER=1 any other is a failure."""
    if reason := missing():
        message = f"a test cluster {reason}"
        if os.environ.get("MEMLAUNCH_REQUIRE_CLUSTER") == "1":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def cluster(machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two compute nodes, ``node1`` and ``node2``, and a login node; it ends with the tests."""
    with Cluster.up(tmp_path_factory.mktemp("cluster"), bound=True) as cluster:
        yield cluster
