"""The direction of imports: read from the source, so that a lazy import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("recipes", "streaming", "monitoring", "trainers", "cluster")
SPINE = {
    "errors",
    "record",
    "model_facts",
    "contracts",
    "processes",
    "retry",
    "multipart",
    "storage",
    "torchvision",
    "html_page",
    "__init__",
}
MAY_IMPORT = {
    "errors": set(),
    "record": set(),
    "model_facts": {"record"},
    "contracts": {"record", "model_facts"},
    "processes": set(),
    "retry": {"errors"},
    "multipart": {"errors", "retry"},
    "storage": {"record", "errors", "retry", "multipart"},
    "torchvision": set(),
    "html_page": set(),
    "recipes": {"errors", "contracts", "storage"},
    "streaming": {"errors", "contracts", "processes", "retry", "storage", "torchvision", "html_page", "recipes"},
    "monitoring": {"errors", "contracts", "processes", "storage", "html_page", "recipes"},
    "trainers": {"errors", "contracts", "processes", "storage", "torchvision", "recipes", "streaming", "monitoring"},
    "cluster": {"errors", "contracts", "processes", "retry", "storage", "recipes", "monitoring"},
}
HEAVY = ("torch", "ray", "transformers", "streaming", "numpy", "tokenizers", "pandas", "pyarrow")


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def units() -> list[tuple[str, Path]]:
    files = [(folder, path) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [(path.stem, path) for path in sorted((ROOT / "src/outgrow").glob("*.py"))]
    return [(unit, path) for unit, path in files if unit in MAY_IMPORT]


@pytest.mark.parametrize(
    ("unit", "path"), units(), ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else ""
)
def test_imports_point_one_way(unit: str, path: Path) -> None:
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "outgrow" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] == unit or parts[1] in MAY_IMPORT[unit], f"{path.relative_to(ROOT)} imports {name}"


def test_every_module_of_ours_is_placed() -> None:
    spine = {path.stem for path in (ROOT / "src/outgrow").glob("*.py")} - {"__init__", "__main__"}
    assert spine <= set(MAY_IMPORT)
    folders = {path.name for path in (ROOT / "src/outgrow").iterdir() if path.is_dir()} - {"__pycache__", "cli"}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_top_folder_never_hides_an_installed_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "src/outgrow" / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()


def test_only_the_seam_imports_mosaicml() -> None:
    for _, path in units():
        if path.name != "_mosaic.py":
            assert not any(name.split(".")[0] == "streaming" for name in imports_of(path)), path


def test_trainers_import_neither_streaming_nor_ray_at_module_level() -> None:
    for path in sorted((ROOT / "trainers").rglob("*.py")):
        for name in module_level_imports(path):
            assert name.split(".")[0] != "ray", path
            assert not name.startswith("outgrow.streaming"), path


def test_transformers_is_imported_where_it_can_be() -> None:
    """``trainers.models`` first makes torchvision importable beside a CPU build of torch; all else comes after."""
    for unit, path in units():
        if not path.is_relative_to(ROOT / "trainers/models"):
            assert not [name for name in module_level_imports(path) if name.startswith("transformers")], f"{unit}: {path}"


def test_contracts_import_nothing_heavy() -> None:
    code = "import outgrow.contracts, outgrow.errors, sys; print([m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in HEAVY if f"'{name}'" in loaded]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from outgrow.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', [m for m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in (*HEAVY, "pydantic", "fsspec") if f"'{name}'" in loaded.split("LOADED")[1]]


def test_theirs_and_ours_both_resolve_from_the_repository_root() -> None:
    code = "import streaming, outgrow.streaming; print(streaming.__file__); print(list(outgrow.streaming.__path__)[0])"
    code = "from outgrow.torchvision import ensure_importable; ensure_importable()\n" + code
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "site-packages" in out[0]
    assert Path(out[1]).resolve() == ROOT / "streaming"
