"""Who imports whom: the plan of the house, held by looking at the source and at what a process has loaded."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "bitsandbytes"}
#: What runs in a rank; the rest of the launcher runs on a login node, in a fraction of a second.
IN_A_RANK = (
    *("launcher/training", "launcher/worker.py", "launcher/current.py"),
    *("launcher/plan/batches.py", "launcher/plan/probing.py", "launcher/plan/trace"),
)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def in_a_rank(path: Path) -> bool:
    return any(path.is_relative_to(ROOT / part) for part in IN_A_RANK)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("memlaunch", *(part for part in parts if part != "__init__")))


def imports(path: Path) -> set[str]:
    """Every module that ``path`` names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def below(package: str, modules: set[str]) -> set[str]:
    return {module for module in modules if module == package or module.startswith(f"{package}.")}


def test_strategies_know_nothing_of_the_launcher() -> None:
    for path in sources("strategies"):
        assert not below("memlaunch.launcher", imports(path)), path


def test_only_the_worker_imports_training() -> None:
    for path in sources("launcher"):
        if not in_a_rank(path):
            assert not below("memlaunch.launcher.training", imports(path)), path


def test_the_folders_at_the_root_are_never_imported_by_their_bare_names() -> None:
    """They would be a user's own `launcher` or `strategies`."""
    for folder in ("launcher", "strategies", "deploy", "tests"):
        for path in sources(folder):
            for bare in ("launcher", "strategies", "deploy"):
                assert not below(bare, imports(path)), path


def test_a_login_node_loads_no_deep_learning_library() -> None:
    modules = [
        module_name(path)
        for folder in ("strategies", "launcher")
        for path in sources(folder)
        if not in_a_rank(path)
    ]
    program = f"""
import importlib, json, sys
loaded = {{}}
for module in {modules!r}:
    importlib.import_module(module)
    loaded[module] = sorted({HEAVY!r} & set(sys.modules))
print(json.dumps(loaded))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert {module: heavy for module, heavy in json.loads(finished.stdout).items() if heavy} == {}
