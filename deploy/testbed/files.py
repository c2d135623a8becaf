"""The configuration files of a test cluster; pure functions, text out."""

from collections.abc import Mapping, Sequence

#: What each node calls itself in SLURM; more than the machine has, so that jobs need not wait for each other.
CPUS = 8
GPUS = 2
MEMORY_MB = 8000


def hosts(addresses: Mapping[str, str]) -> str:
    """``/etc/hosts``: host name -> address. Without it, libraries lose seconds on each reverse look-up."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    return "\n".join(lines) + "\n"


def hostfile(nodes: Sequence[str], slots: int) -> str:
    """The hostfile of the compute nodes."""
    return "".join(f"{node} slots={slots}\n" for node in nodes)


def passwd(text: str, home: str) -> str:
    """``/etc/passwd`` as it is in ``text``, with root at home in ``home``."""
    users = (line.split(":") for line in text.splitlines())
    return "".join(
        ":".join([*user[:5], home, user[6]] if user[0] == "root" else user) + "\n" for user in users
    )


def sshd_config() -> str:
    """``/etc/ssh/sshd_config``: root logs in with a key, which lies in a folder of any mode."""
    return """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
MaxStartups 100
"""


def ssh_config() -> str:
    """``/etc/ssh/ssh_config``: never a question."""
    return "Host *\n    BatchMode yes\n    StrictHostKeyChecking yes\n    ConnectTimeout 10\n"


def known_hosts(names: Sequence[str], public_key: str) -> str:
    """``/etc/ssh/ssh_known_hosts``: all nodes have one host key."""
    return f"{','.join(names)} {public_key.strip()}\n"


def slurm_conf(head: str, nodes: Sequence[str], state: str) -> str:
    """``/etc/slurm/slurm.conf``; paths are each node's own, but for the controller's ``state``."""
    return f"""\
ClusterName=testbed
SlurmctldHost={head}
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={state}
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=0,defer_batch
ReturnToService=2
SlurmdTimeout=20
KillWait=10
JobRequeue=1
GresTypes=gpu
NodeName={",".join(nodes)} CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def gres_conf() -> str:
    """``/etc/slurm/gres.conf``: GPUs to be counted and given out, with nothing behind them."""
    return "AutoDetect=off\nName=gpu File=/dev/zero\nName=gpu File=/dev/full\n"


def cgroup_conf() -> str:
    """``/etc/slurm/cgroup.conf``: leave the control groups of the machine alone."""
    return "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
