"""The house rule: imports only go down, and rooms on one floor don't know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "loraxs_ext"
FACADE = ""  # loraxs_ext/__init__.py: gathers what users import, so it may import every room and no room may import it

# A new room needs a line here, and with it a decision where it lives.
FLOORS = {
    "_C": 0,
    "files": 1,
    "ops": 1,
    "basis": 2,
    "layers": 2,
    "store": 2,
    "peft": 3,
    "checkpoint": 4,
    "advisor": 4,
    "training": 4,
    "serve": 5,
    FACADE: 6,
    "commands": 7,
    "cli": 8,
}


def modules() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def room_of(path: Path) -> str:
    """The room that a file of the package belongs to."""
    first = path.relative_to(ROOT / PACKAGE).parts[0]
    return FACADE if first == "__init__.py" else first.removesuffix(".py")


def imported_rooms(source: str, path: Path) -> set[str]:
    """The rooms of the package that ``source``, the text of ``path``, imports, wherever in the file that is.

    ``from loraxs_ext import name`` imports a room if there is one of that name, else from the facade.
    """
    here = [PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts]
    found: set[str] = set()

    def add(parts: list[str], names: list[str]) -> None:
        if parts[:1] != [PACKAGE]:
            return
        if len(parts) > 1:
            found.add(parts[1])
        else:
            found.update(name if name in FLOORS else FACADE for name in names)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name.split("."), [FACADE])
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            add(here[: -node.level] + module if node.level else module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                add(str(node.args[0].value).split("."), [FACADE])
    return found


def violations(source: str, path: Path) -> list[str]:
    """What ``source`` imports against the house rule."""
    room = room_of(path)
    return [
        f"{path.relative_to(ROOT)}: {room or 'the facade'} (floor {FLOORS[room]}) imports {other or 'the facade'}"
        f" (floor {FLOORS[other]})"
        for other in sorted(imported_rooms(source, path) - {room})
        if FLOORS[other] >= FLOORS[room]
    ]


def test_there_is_something_to_walk() -> None:
    assert {"ops", "basis", "layers", "peft", "cli", FACADE} <= {room_of(path) for path in modules()}


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in modules()} <= set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_nobody_imports_tests_or_examples(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {name.split(".")[0] for name in names} & {"python_tests", "examples", "benchmarks"}


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("ops/a.py", "from loraxs_ext.peft import x", True),
        ("ops/a.py", "import loraxs_ext.layers.linear", True),
        ("ops/a.py", "import loraxs_ext", True),
        ("ops/a.py", "def f():\n    from ..basis import x", True),
        ("ops/a.py", "import importlib\nimportlib.import_module('loraxs_ext.serve')", True),
        ("layers/a.py", "from loraxs_ext import basis", True),
        ("layers/deep/a.py", "from ...basis.recipe import Recipe", True),
        ("layers/a.py", "from loraxs_ext import __version__", True),
        ("basis/a.py", "from .. import layers", True),
        ("peft/a.py", "from ..checkpoint import x", True),
        ("peft/a.py", "from ..basis import x\nfrom ..layers.linear import y\nfrom .b import z", False),
        ("layers/a.py", "from loraxs_ext import ops\nimport loraxs_ext.ops.reference\nimport torch", False),
        ("ops/a.py", "from loraxs_ext import _C\nfrom . import contract", False),
        ("cli.py", "from . import __version__, ops", False),
        ("__init__.py", "from .peft import LoraXSConfig", False),
        ("__init__.py", "from .cli import main", True),
    ],
)
def test_the_walk_sees(file: str, source: str, refused: bool) -> None:
    assert bool(violations(source, ROOT / PACKAGE / file)) is refused


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_does_not_bring_triton() -> None:
    # torch and peft import Triton themselves where it is installed; ours must not, whether before or after them.
    code = """
import importlib.abc, sys, traceback
importers = []
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            frames = [f.filename for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
            importers.append(frames[-1])
sys.meta_path.insert(0, Watch())
import {module}
print([file for file in importers if "loraxs_ext" in file])
"""
    assert run_python(code.replace("{module}", "loraxs_ext.cli")) == "[]"
    # The watch works: an import from a file of that name is seen.
    assert "loraxs_ext" in run_python(code.replace("import {module}", PRETEND))


# Compiles an `import triton` as if it stood in a file of the package; the module need not exist.
PRETEND = """
try:
    exec(compile("import triton", "/somewhere/loraxs_ext/ops/x.py", "exec"))
except ImportError:
    pass
"""


def test_import_does_not_initialise_cuda() -> None:
    # Every use of a CUDA device goes through _lazy_init.
    trap = "import torch; torch.cuda._lazy_init = lambda: 1 / 0"
    imports = "import loraxs_ext, loraxs_ext.peft, loraxs_ext.store, loraxs_ext.serve, loraxs_ext.cli"
    assert run_python(f"{trap}; {imports}; print(torch.cuda.is_initialized())") == "False"


def test_import_does_not_bring_lmdb() -> None:
    # A base install has none; the error that names the extra comes when a store is opened.
    assert run_python("import sys, loraxs_ext.store, loraxs_ext.cli; print('lmdb' in sys.modules)") == "False"


def test_import_does_not_bring_what_the_server_needs() -> None:
    """It comes with the extra `serve`; the command line has to be there without it."""
    code = "import sys, loraxs_ext.serve, loraxs_ext.cli; print({'starlette', 'uvicorn', 'pydantic'} & {*sys.modules})"
    assert run_python(code) == "set()"
