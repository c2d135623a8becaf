"""Where ranks meet under MPI, which knows who they are; torch.distributed learns it from the environment."""

import os
import socket
from importlib import metadata
from types import TracebackType
from typing import Any

from memlaunch.launcher import ports

#: What must be the same on all machines.
PACKAGES = ("memlaunch", "torch", "transformers", "deepspeed", "bitsandbytes")

#: Which of how many ranks this is, as mpirun tells it.
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

#: What MPI tells a rank; another MPI in the processes below it would take itself for this rank.
_OWN = ("OMPI_", "PMI_", "PMIX_", "ORTE_", "HYDRA_", "HYDI_", "MPIR_")


class CannotMeet(Exception):
    """The ranks cannot work together; ``rank`` is this one."""

    def __init__(self, message: str, hint: str, rank: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.rank = rank


class Meeting:
    """This process as an MPI rank; the others are gone when it is left as a whole.

    Attributes:
        environment: this process's, with what torch.distributed looks for: ``RANK``, ``LOCAL_RANK``,
            ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``.
        whole: whether every rank is to be waited for at the end; MPI ends the others otherwise.
    """

    def __init__(self) -> None:
        """Meet the other ranks.

        Raises:
            CannotMeet: there is no MPI, it is not that of mpirun, or the machines have different versions.
        """
        expected = next((int(os.environ[name]) for name in _SIZE if name in os.environ), 1)
        try:
            import mpi4py

            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise CannotMeet(
                f"mpi4py does not work here: {error}",
                "install it and the library of MPI on every machine",
                _rank(),
            ) from error
        self._mpi = MPI
        self.whole = False
        world = MPI.COMM_WORLD
        if world.size != expected:
            raise CannotMeet(
                f"mpirun started {expected} ranks, and mpi4py sees {world.size}",
                "mpi4py uses the library of another MPI; let LD_LIBRARY_PATH lead to that of mpirun",
                _rank(),
            )
        here = world.Split_type(MPI.COMM_TYPE_SHARED)
        self._compare_versions(world)
        alone = here.size == world.size
        place = ("127.0.0.1" if alone else socket.gethostname(), ports.find()) if world.rank == 0 else None
        address, port = world.bcast(place)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
        self.environment = {
            **inherited,
            "RANK": str(world.rank),
            "WORLD_SIZE": str(world.size),
            "LOCAL_RANK": str(here.rank),
            "LOCAL_WORLD_SIZE": str(here.size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }

    def _compare_versions(self, world: Any) -> None:
        mine = (socket.gethostname(), {name: _version(name) for name in PACKAGES})
        (first, expected), *others = world.allgather(mine)
        for host, versions in others:
            for name, version in versions.items():
                if version != expected[name]:
                    raise CannotMeet(
                        f"{name} is {expected[name]} on {first} and {version} on {host}",
                        "install the same versions on every machine; `memlaunch doctor` compares them",
                        world.rank,
                    )

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.whole:
            self._mpi.Finalize()


def _rank() -> int:
    """This rank, as mpirun tells it."""
    return next((int(os.environ[name]) for name in _RANK if name in os.environ), 0)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
