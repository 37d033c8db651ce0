"""Who may import whom, and what a client that waits does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "strategies": {"clients"},
    "clients": {"strategies"},
    "fedkit": {"strategies", "clients"},
}


def modules_of(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"there is no package {package} in {ROOT}"
    return files


def imported_by(file):
    """Top-level names of all that a file imports, wherever in it, by statement or by name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # Relative: within the package, unless it climbs out of it.
                depth = len(file.relative_to(ROOT).parents) - 1
                assert node.level <= depth, f"{file} imports from above its package"
            elif node.module:
                yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            name = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield str(name.value).partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_apart(package):
    broken = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules_of(package)
        for name in imported_by(file)
        if name in FORBIDDEN[package]
    }
    assert not broken


def test_nothing_installed_imports_the_tests():
    for package in FORBIDDEN:
        for file in modules_of(package):
            assert not {"tests", "inprocess", "pytest"} & set(imported_by(file)), file


def test_the_check_sees_lazy_imports(tmp_path):
    file = tmp_path / "lazy.py"
    file.write_text(
        "import a.b\n"
        "def f():\n"
        "    from c.d import e\n"
        "    importlib.import_module('g.h')\n"
        "    __import__('i')\n"
    )
    assert set(imported_by(file)) == {"a", "c", "g", "i"}


@pytest.mark.parametrize(
    "module", ["fedkit", "fedkit.cli.app", "fedkit.link.client", "fedkit.engine.client"]
)
def test_starting_loads_neither_torch_nor_flower(module):
    """`fedkit --help` answers at once, and a client that waits for an instruction stays small."""
    heavy = ("torch", "flwr", "torchvision", "sklearn", "pandas", "numpy", "cryptography", "onnx")
    heavy += ("prometheus_client", "google.protobuf", "grpc_health.v1")
    code = f"import sys, {module}; print(sorted(set({heavy}) & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ran.stdout.strip() == "[]"
