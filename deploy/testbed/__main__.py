"""``python -m memlaunch.deploy.testbed``: a test cluster from the command line."""

import argparse
import sys
from pathlib import Path

from memlaunch.deploy.testbed import cluster
from memlaunch.deploy.testbed.cluster import Cluster, TestbedError


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="testbed", description="A real cluster on one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "up": "bring up a cluster; one in the same folder goes first",
        "down": "take it down; nothing stays behind",
        "stop": "end every process of a node",
        "cut": "take a node off the network",
        "restore": "bring back a node that was stopped or cut off",
        "on": "run a program on a node",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", help="everything of the cluster is in it")
        if name == "up":
            command.add_argument("--nodes", type=int, default=2, help="compute nodes (2)")
        elif name != "down":
            command.add_argument("node", help="head, node1, node2, ...")
        if name == "on":
            command.add_argument("argv", nargs=argparse.REMAINDER, help="the program and its arguments")
    arguments = parser.parse_args()
    try:
        return _do(arguments)
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _do(arguments: argparse.Namespace) -> int:
    if arguments.command == "up":
        bed = Cluster.up(arguments.folder, arguments.nodes)
        print(f"{bed.head} and {', '.join(bed.nodes)} are up in {bed.folder}")
    elif arguments.command == "down":
        cluster.down(arguments.folder)
    elif arguments.command == "on":
        return (
            Cluster(arguments.folder)
            .start(
                arguments.node,
                arguments.argv,
                cwd=Path.cwd(),
                stdin=sys.stdin,
                stdout=sys.stdout,
                stderr=sys.stderr,
            )
            .wait()
        )
    else:
        getattr(Cluster(arguments.folder), arguments.command)(arguments.node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
