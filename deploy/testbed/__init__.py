"""A real cluster on one machine: nodes with sshd, munge and SLURM, which programs take for computers.

Each node is a set of Linux namespaces: its own processes, host name, network, ``/run`` and ``/dev/shm``.
The network of the nodes is joined to nothing else, so a cluster listens on addresses of its own only, and
any number of them stand side by side. All files of a cluster lie in one folder; the rest of the file system
is shared by its nodes, as a cluster shares its home folders. Needs Linux, root and what ``PROGRAMS`` names::

    python -m memlaunch.deploy.testbed up /tmp/bed --nodes 2
    python -m memlaunch.deploy.testbed on /tmp/bed head srun --nodes 2 hostname
    python -m memlaunch.deploy.testbed down /tmp/bed
"""

from memlaunch.deploy.testbed.cluster import PROGRAMS, Cluster, NodeProcess, TestbedError, missing

__all__ = ["Cluster", "NodeProcess", "PROGRAMS", "TestbedError", "missing"]
