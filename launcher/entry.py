"""A model of the user's own: what the function that ``model.entry`` names returns, and where it stands.

``"entry": "cnn:build"`` is the function ``build`` of ``cnn.py`` beside the job file. Every rank calls it
once, with the keys of ``model.config`` as arguments. It returns an :class:`Entry`.
"""

import ast
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from memlaunch.launcher.keys import closest
from memlaunch.launcher.paths import BadPath, beside, kind, read_small

if TYPE_CHECKING:
    from torch import Tensor, nn


class Samples(Protocol):
    """Anything with a length and samples that are found by their number, such as a ``Dataset`` of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is trained, on what, and by what loss.

    Attributes:
        model: any module. Every rank must build the same one: random numbers are seeded alike before.
        train: the samples to train on; as many on every rank.
        loss: (outputs, targets) -> (sum, count): the loss summed over a micro-batch, a scalar, and
            how many samples or tokens it is the sum over. An optimizer step follows the sum over its whole
            global batch divided by the count of that, so that each weighs the same wherever it is computed.
        collate: a list of samples -> (inputs, targets). Inputs are a tensor, a tuple of tensors that the
            model takes in this order, or a mapping of argument names to tensors; targets are any tensors,
            nested in lists, tuples and dicts as the loss likes them. Default: torch's ``default_collate``,
            for samples that are such pairs.
        eval: the samples to evaluate on.
        count: targets -> the count, where it is not the number of samples; it is needed before the model has
            run. The loss must agree with it.
        lengths: the length of each training sample in tokens, frames or the like. With them samples of like
            length come together, as ``data.batching`` says; without, batches are random.
        metrics: (outputs, targets) -> name -> sum over the micro-batch, for evaluations: each is divided by
            the count of all, and recorded as ``eval_NAME``.
    """

    model: "nn.Module"
    train: Samples
    loss: "Callable[[Any, Any], tuple[Tensor, int | Tensor]]"
    collate: Callable[[list[Any]], tuple[Any, Any]] | None = None
    eval: Samples | None = None
    count: Callable[[Any], int] | None = None
    lengths: Sequence[int] | None = None
    metrics: "Callable[[Any, Any], Mapping[str, float | Tensor]] | None" = None


@dataclass(frozen=True)
class Place:
    """Where the function of an entry stands: in ``module``, which is imported from ``folder``."""

    folder: Path
    module: str
    function: str

    @property
    def name(self) -> str:
        """As a job file names it from anywhere."""
        return f"{self.folder / self.module}:{self.function}"

    @property
    def file(self) -> Path:
        """The file of the module; the one of a package is its ``__init__.py``."""
        path = self.folder.joinpath(*self.module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


def parse(entry: str, base: Path) -> Place:
    """The place that ``[FOLDER/]MODULE:FUNCTION`` names, seen from ``base``; nothing is looked up.

    Raises:
        BadPath: it is not written so.
    """
    path, colon, function = entry.rpartition(":")
    folder, _, module = path.rpartition("/")
    names = [*module.split("."), function]
    if not colon or path.endswith(".py") or not all(map(str.isidentifier, names)):
        hint = "write the module and its function, such as `my_module:build`"
        if colon and path.endswith(".py"):
            hint = f"write the module without `.py`: `{path.removesuffix('.py')}:{function}`"
        raise BadPath(f"`{entry}` is not a module and a function", hint)
    root = "/" if path.startswith("/") and not folder else folder
    return Place(beside(root, base) if root else base.absolute(), module, function)


def locate(entry: str, base: Path) -> Place:
    """:func:`parse`, with a look at the file, of which nothing is run.

    Raises:
        BadPath: there is no such file, it is not Python, or defines no such function; or the name of the
            module is that of one that is installed.
    """
    place = parse(entry, base)
    file = place.file
    head = entry.removesuffix(f"{place.module}:{place.function}")
    if kind(file) != "file":
        there = [p.stem for p in place.folder.glob("*.py")] if place.folder.is_dir() else []
        close = closest(place.module, there)
        hint = "its folder is seen from that of the job file"
        raise BadPath(
            f"there is no file `{head}{file.relative_to(place.folder)}`",
            f"did you mean `{head}{close}:{place.function}`?" if close else hint,
        )
    try:
        tree = ast.parse(read_small(file))
    except OSError as error:
        raise BadPath(f"`{file.name}` cannot be read: {error.strerror}", "look at its permissions") from None
    except (SyntaxError, ValueError) as error:
        line = f"{file.name}:{error.lineno}" if isinstance(error, SyntaxError) else file.name
        raise BadPath(f"`{line}` is not Python: {error.args[0]}", "mend the line") from None
    names = _defined(tree)
    if place.function not in names:
        close = closest(place.function, names)
        raise BadPath(
            f"`{file.name}` defines no `{place.function}`",
            f"did you mean `{head}{place.module}:{close}`?" if close else f"write `def {place.function}():`",
        )
    if (other := taken(place)) is not None:
        raise BadPath(f"`{place.module}` is also the name of {other}", "give your file another name")
    return place


def taken(place: Place) -> str | None:
    """What else Python would import by the name of the module, in words; None where there is nothing."""
    top = place.module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return "a module of Python's own"
    path = [folder for folder in sys.path if folder not in ("", str(Path.cwd()), str(place.folder))]
    found = importlib.machinery.PathFinder.find_spec(top, path)
    if found is None or found.origin is None or Path(found.origin).is_relative_to(place.folder):
        return None
    return f"an installed module, {found.origin}"


def _defined(tree: ast.Module) -> list[str]:
    """The names that a module binds at its top."""
    names: list[str] = []
    for node in ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.ClassDef)], [])):
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return names
