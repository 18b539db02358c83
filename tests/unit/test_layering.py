"""The directions of imports, shared by all of `model/` and `commands/`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = ("model.train_medusa", "model.distill")
# What each room may import, besides itself. A room is a folder of model/ or a file there.
FOUNDATION = {"errors", "storage", "base", "trees"}
BELOW = {
    "errors": set[str](),
    "storage": {"errors"},
    "base": {"errors", "storage"},
    "trees": {"errors"},
    "heads": FOUNDATION,
    "decoding": {"errors", "base", "trees"},
    # A GGUF with its heads, loaded and ready to decode: where heads and decoding meet.
    "loaded_model": {*FOUNDATION, "heads", "decoding"},
    "planning": {*FOUNDATION, "decoding", "loaded_model"},
    "engine": {*FOUNDATION, "heads", "decoding", "loaded_model", "planning"},
    "evaluation": {*FOUNDATION, "heads", "decoding", "loaded_model", "planning"},
    "training": {*FOUNDATION, "heads", "decoding"},
    "serving": {*FOUNDATION, "heads", "decoding", "loaded_model", "planning"},
}
OUTSIDE = {"benchmarks", "scripts", "tests", "main"}  # nothing of the product imports these
CONFINED = {
    "llama_cpp": {"base"},
    "gguf": {"base"},
    "torch": {"heads", "training"},
}


def imports(path: Path, module: str, *, types: bool) -> Iterator[str]:
    """Yield the full names that a file imports anywhere in it; `from a import b` gives a.b.

    types: with those under `if TYPE_CHECKING`, which never run.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*up, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def graph(root: Path, *, types: bool = True) -> dict[str, set[str]]:
    """Return each module of model/ and commands/ with the full names that it imports."""
    found = {}
    for path in sorted([*(root / "model").rglob("*.py"), *(root / "commands").rglob("*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[module] = set(imports(path, module, types=types))
    return found


def violations(root: Path) -> list[str]:
    """Return a line for each import that goes where it must not."""
    bad = []
    for module, names in graph(root).items():
        for name in sorted(names):
            why = objection(module, name)
            if why:
                bad.append(f"{module} imports {why}")
    return bad


def objection(module: str, name: str) -> str:
    """Say what is wrong with an import; nothing where it may be."""
    top, _, rest = name.partition(".")
    if top in OUTSIDE:
        return f"{top}: not a part of the product"
    if module == "model" or module in ENTRY_POINTS or module.split(".")[0] == "commands":
        return f"{top}" if top in CONFINED and top != "torch" else ""
    room = module.split(".")[1]
    target = rest.partition(".")[0]
    if top == "commands":
        return f"{name}: upwards or sideways"
    if top == "config":
        return "config: for entry points alone"
    if room not in CONFINED.get(top, {room}):
        return top
    if top == "model" and target not in BELOW.get(room, set()) | {room}:
        return f"{name}: upwards or sideways"
    return ""


def circles(root: Path) -> list[str]:
    """Return the modules that import one another in a circle, and those above.

    Imports for types alone make none.
    """
    modules = graph(root, types=False)
    edges = {
        module: {
            other
            for other in modules
            for n in names
            if other != module and other in (n, n.rpartition(".")[0])
        }
        for module, names in modules.items()
    }
    while free := {m for m, targets in edges.items() if not targets & edges.keys()}:
        edges = {m: targets for m, targets in edges.items() if m not in free}
    return sorted(edges)


def shadows(root: Path) -> list[str]:
    """Return the names in model/ that would hide others where model/ is first on sys.path.

    As `python model/x.py` puts it.
    """
    ours = {
        path.stem for path in (root / "model").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    return sorted(
        (ours - {"__init__", "__pycache__"})
        & (sys.stdlib_module_names | packages_distributions().keys())
    )


def test_imports_run_downwards() -> None:
    assert len(graph(ROOT)) > 60 and any(module.startswith("commands.") for module in graph(ROOT))
    assert violations(ROOT) == []
    assert circles(ROOT) == []
    assert shadows(ROOT) == []


UP = "upwards or sideways"


@pytest.mark.parametrize(
    ("file", "line", "report"),
    [
        ("base/a.py", "from model.heads import medusa", f"base.a imports model.heads.medusa: {UP}"),
        (
            "heads/a.py",
            "from model.decoding.step import step",
            f"heads.a imports model.decoding.step.step: {UP}",
        ),
        ("decoding/a.py", "def f():\n    import torch.nn", "decoding.a imports torch"),
        (
            "decoding/a.py",
            "from ..heads.medusa import X",
            f"decoding.a imports model.heads.medusa.X: {UP}",
        ),
        ("trees/a.py", "from model import base", f"trees.a imports model.base: {UP}"),
        ("training/a.py", "from llama_cpp import llama_decode", "training.a imports llama_cpp"),
        ("heads/a.py", "import gguf.quants as q", "heads.a imports gguf"),
        (
            "heads/a.py",
            "from config import Settings",
            "heads.a imports config: for entry points alone",
        ),
        (
            "storage/a.py",
            "from model.base.llama import L",
            f"storage.a imports model.base.llama.L: {UP}",
        ),
        ("decoding/a.py", "import model.planning.x", f"decoding.a imports model.planning.x: {UP}"),
        ("planning/a.py", "from model.engine import E", f"planning.a imports model.engine.E: {UP}"),
        ("engine.py", "import model.serving.http", f"engine imports model.serving.http: {UP}"),
        ("evaluation/a.py", "import model.engine", f"evaluation.a imports model.engine: {UP}"),
        ("planning/a.py", "import commands.bench", f"planning.a imports commands.bench: {UP}"),
        (
            "evaluation/a.py",
            "import benchmarks.x",
            "evaluation.a imports benchmarks: not a part of the product",
        ),
        (
            "train_medusa.py",
            "import tests.x",
            "train_medusa imports tests: not a part of the product",
        ),
        ("errors.py", "import model.base.llama", f"errors imports model.base.llama: {UP}"),
        (
            "training/a.py",
            "from model.train_medusa import f",
            f"training.a imports model.train_medusa.f: {UP}",
        ),
        ("attic/a.py", "import model.base", f"attic.a imports model.base: {UP}"),
    ],
)
def test_a_planted_violation_is_caught(file: str, line: str, report: str, tmp_path: Path) -> None:
    path = tmp_path / "model" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == [f"model.{report}"]


@pytest.mark.parametrize(
    "line", ["import benchmarks.x", "def f():\n    from benchmarks.x import y"]
)
def test_commands_need_no_benchmarks(line: str, tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "a.py").write_text(line + "\n")
    assert violations(tmp_path) == ["commands.a imports benchmarks: not a part of the product"]
    (tmp_path / "commands" / "a.py").write_text("import gguf\n")
    assert violations(tmp_path) == ["commands.a imports gguf"]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "a.py").write_text("import model.engine, config, torch, commands.b")
    for file, text in {
        "base/a.py": "import llama_cpp, gguf\nfrom model.errors import E\nfrom . import c",
        "decoding/a.py": "import numpy\nimport model.trees.tree\nfrom model.base.llama import L",
        "train_medusa.py": "from config import S\nimport model.training.trainer, torch",
    }.items():
        (tmp_path / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / file).write_text(text)
    assert violations(tmp_path) == []


def test_planted_circles_and_shadows_are_caught(tmp_path: Path) -> None:
    (tmp_path / "model" / "base").mkdir(parents=True)
    (tmp_path / "model" / "base" / "a.py").write_text("from model.base.b import x")
    (tmp_path / "model" / "base" / "b.py").write_text("def f():\n    from model.base import c")
    (tmp_path / "model" / "base" / "c.py").write_text("from .a import f")
    (tmp_path / "model" / "base" / "d.py").write_text("from model.base.a import f")
    assert circles(tmp_path) == ["model.base.a", "model.base.b", "model.base.c", "model.base.d"]
    (tmp_path / "model" / "base" / "c.py").write_text(
        "if TYPE_CHECKING:\n    from .a import f\nelse:\n    import os"
    )
    assert circles(tmp_path) == []
    (tmp_path / "model" / "tokenize.py").touch()
    (tmp_path / "model" / "datasets").mkdir()
    assert shadows(tmp_path) == ["datasets", "tokenize"]


def test_decoding_runs_without_torch() -> None:
    rooms = ("model.base.", "model.trees.", "model.decoding.")
    modules = [m for m in graph(ROOT) if m.startswith(rooms)]
    assert any(m.startswith("model.decoding.") for m in modules)
    code = (
        f"import sys\nfor m in {modules}: __import__(m)\n"
        "print('torch' in sys.modules, 'llama_cpp' in sys.modules)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert seen.strip() == "False True"
