"""The rules that keep the house in order: which way imports point, and which names modules may carry."""

import ast
import graphlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "thinktwice_fast"
OPS = ROOT / "kernels" / "thinktwice_kernels"
# Lower layers first; a module may import its own layer's folder and anything lower. `tasks`, `rollout` and
# `update` stand side by side and don't know each other.
LAYERS = [
    {"errors", "launch"},
    {"records", "bounds"},
    {"thinktuning_options"},
    {"config", "parallel"},
    {"model"},
    {"tasks", "rollout", "update"},
    {"algorithms"},
    {"run"},
    {"cli"},
]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
    return found


def room(module: str) -> str:
    """The part of thinktwice_fast that a dotted module name lies in."""
    return module.split(".")[1]


def layer(name: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "train":
        return
    for module in imports(path):
        if not module.startswith("thinktwice_fast.") or room(module) == own:
            continue
        other = room(module)
        assert layer(other) < layer(own), f"{path.relative_to(ROOT)} imports {module}: {own} must not know {other}"


@pytest.mark.parametrize("package", [PACKAGE, OPS, ROOT / "bench"], ids=lambda path: path.name)
def test_no_imports_go_in_circles(package: Path) -> None:
    """Nor by way of a function, where Python would not notice."""
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    paths = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in files}
    needs = {name: {other for other in imports(path) if other in paths} - {name} for name, path in paths.items()}
    tuple(graphlib.TopologicalSorter(needs).static_order())  # raises a CycleError that names them


def test_benchmarks_stand_without_the_tests() -> None:
    for path in (ROOT / "bench").rglob("*.py"):
        assert not {module for module in imports(path) if module.split(".")[0] == "tests"}, path


def test_the_entry_point_only_parses_builds_and_runs() -> None:
    assert {room(m) for m in imports(PACKAGE / "train.py") if m.startswith("thinktwice_fast.")} == {
        "errors",
        "launch",
        "run",
    }


SHARED = ("model", "tasks", "rollout")  # by several commands, each of which has names of its own for options
NAMES_AN_OPTION = re.compile(r"--[a-z]")


@pytest.mark.parametrize("part", SHARED)
def test_shared_errors_name_no_option_in_their_text(part: str) -> None:
    """They hold an `Option`, so that each command can show its own name; see errors.py."""
    for path in (PACKAGE / part).rglob("*.py"):
        tree = ast.parse(path.read_text())
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        notes = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
        found = [text for text in texts if NAMES_AN_OPTION.search(text) and text not in notes]
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_the_ops_library_knows_nothing_of_the_trainer() -> None:
    allowed = {"torch", "triton", "numpy", "thinktwice_kernels"} | set(sys.stdlib_module_names)
    for path in OPS.rglob("*.py"):
        # A drop-in for another project may know that project, the one it is named after.
        peer = {path.stem} if path.parent.name == "integrations" else set()
        foreign = {module.split(".")[0] for module in imports(path)} - allowed - peer
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def stands_on(module: str) -> set[str]:
    """The modules of thinktwice_kernels that one imports, and those that these import, itself among them."""
    found, open_ends = set(), {module}
    while open_ends:
        name = open_ends.pop()
        found.add(name)
        named = imports(OPS / f"{name.replace('.', '/')}.py")
        inside = {other.partition(".")[2] for other in named if other.startswith("thinktwice_kernels.")}
        open_ends |= {other for other in inside if (OPS / f"{other.replace('.', '/')}.py").exists()} - found
    return found


def test_the_fused_loss_stands_on_nine_files() -> None:
    """On CUDA their kernels come on top, which are launched from triton/."""
    own = {"linear_loss", "segments", "exponentials", "rows"}
    assert stands_on("linear_loss") == {*own, "loss", "advantages", "options", "metrics", "launch"}


def test_a_numeric_option_of_the_loss_stands_in_three_files() -> None:
    names = {str(path.relative_to(OPS)) for path in OPS.rglob("*.py") if "rollout_is_cap" in path.read_text()}
    assert names == {"options.py", "loss.py", "triton/loss.py"}


def test_no_module_shadows_another() -> None:
    """`torchrun thinktwice_fast/train.py` puts thinktwice_fast/ first on the module path."""
    names = {entry.stem for entry in PACKAGE.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert not names & (taken - {"thinktwice_fast", "thinktwice_kernels"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400, "split it: a file is read in one sitting"


def test_nothing_is_unpickled() -> None:
    """To read a checkpoint, a model or a data set of somebody else's must not run their code."""
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        readers = {"torch.load", "torch.save", "np.load", "numpy.load", "pickle.load", "pickle.loads"}
        assert not calls & readers and not imports(path) & {"pickle", "shelve", "dill"}, path
