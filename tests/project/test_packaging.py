"""The top-level folder `kernels/` is `tokenprune.kernels` in every form in which the library reaches a user; the lock
and the versions said to be tested fit `pyproject.toml` and the library.

A copy of the sources is built without an index or an isolated environment, and each form is imported by an interpreter
that sees it and the installed packages, and not the checkout.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tokenprune.upstream.check import TESTED

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "tokenprune",
    "kernels",
)
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
IMPORTED = [
    "tokenprune",
    *(f"tokenprune.kernels.{name}" for name in KERNELS if find_spec("triton")),
]
HEAVY = ("accelerate", "matplotlib", "PIL", "timm", "torchvision", "transformers", "triton")
ORIGINS = "print(json.dumps({name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[2])}))"
LEAN = """
import tokenprune, torch
print(json.dumps([sorted(set(json.loads(sys.argv[2])) & set(sys.modules)), torch.cuda.is_initialized()]))
"""


def run(*command: str, folder: Path) -> str:
    """What `command` prints; its complaints are shown where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def isolated(program: str, path: Path, argument: object, *, folder: Path) -> Any:
    """What `program` prints as JSON, with `path` and the installed packages as its search path.

    The interpreter starts without `site`, so that no installed copy and no editable install is in the way.
    """
    search = json.dumps([str(path), *(entry for entry in sys.path if entry.endswith("-packages"))])
    head = "import importlib, json, sys; sys.path[:0] = json.loads(sys.argv[1])\n"
    return json.loads(run(sys.executable, "-ISc", head + program, search, json.dumps(argument), folder=folder))


def origins(path: Path, *, folder: Path, first: str = "") -> dict[str, Path]:
    """Import the library with `path` at the head of the search path: where it and its kernels came from."""
    found = isolated(f"{first}\n{ORIGINS}", path, IMPORTED, folder=folder)
    return {name: Path(origin) for name, origin in found.items()}


def copy(target: Path) -> Path:
    """A copy of everything that packages are made of."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel made of it, and, in `direct`, the wheel made of the sources."""
    tree, target = copy(tmp_path_factory.mktemp("sources") / "tree"), tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", str(target), str(tree), folder=target)
    run(*build, "--wheel", "--outdir", str(target / "direct"), str(tree), folder=target)
    return target


def test_wheel_holds_the_package_with_the_kernels_in_their_place(built: Path) -> None:
    names = {name for name in contents(next(built.glob("*.whl"))) if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tokenprune").rglob("*.py")
        if path.parent.name != "kernels"
    }
    kernels = {f"tokenprune/kernels/{name}.py" for name in KERNELS}
    assert kernels
    assert names == package | kernels | {"tokenprune/py.typed"}


def test_sdist_builds_the_same_wheel_as_the_sources(built: Path) -> None:
    (sdist,), (wheel,), (direct,) = built.glob("*.tar.gz"), built.glob("*.whl"), (built / "direct").glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    alias = "tokenprune/kernels/__init__.py"
    assert {alias, "README.md", "LICENSE", "CHANGELOG.md"} | {f"kernels/{name}.py" for name in KERNELS} <= names
    assert not [name for name in names if name.startswith(("tests", "bench", "demos"))]
    assert contents(wheel) == contents(direct)


def test_wheel_is_imported_without_the_checkout(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "installed")
    for origin in origins(tmp_path / "installed", folder=tmp_path).values():
        assert origin.is_relative_to(tmp_path / "installed")


def test_raw_checkout_is_imported_from_the_search_path(tmp_path: Path) -> None:
    tree = copy(tmp_path / "tree")
    found = origins(tree, folder=tmp_path)
    assert found.pop("tokenprune").parent == tree / "tokenprune"
    assert {origin.parent for origin in found.values()} == {tree / "kernels"}


def test_editable_install_leads_to_the_checkout_and_keeps_its_root_off_the_search_path(tmp_path: Path) -> None:
    tree, wheels, installed = copy(tmp_path / "tree"), tmp_path / "wheels", tmp_path / "installed"
    wheels.mkdir()
    backend = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    run(sys.executable, "-c", backend, str(wheels), folder=tree)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        archive.extractall(installed)
    # Left on the path, the folder `kernels` would hide the distribution of that name from transformers.
    first = f"import site; site.addsitedir({str(installed)!r}); assert {str(tree)!r} not in sys.path"
    found = origins(installed, folder=tmp_path, first=first)
    assert found.pop("tokenprune").parent == tree / "tokenprune"
    assert {origin.parent for origin in found.values()} == {tree / "kernels"}


def test_import_is_lean_and_leaves_the_gpu_alone(tmp_path: Path) -> None:
    loaded, cuda = isolated(LEAN, ROOT, HEAVY, folder=tmp_path)
    assert loaded == []
    assert not cuda


def test_root_is_not_on_the_search_path_of_the_tests() -> None:
    assert str(ROOT) not in sys.path, "run `pytest`, not `python -m pytest`"


# --- the lock, and the versions that are said to be tested ------------------------------------------------------------


def lock() -> list[str]:
    """The lines of the lock that name packages, each with its hashes."""
    text = (ROOT / "locks" / "test.txt").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def locked() -> dict[str, Version]:
    """The version of every package in the lock."""
    found = {}
    for line in lock():
        requirement = Requirement(line.partition(" --hash=")[0])
        (pin,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert pin.operator == "==", line
        assert name not in found, f"{name} is locked twice"
        found[name] = Version(pin.version)
    return found


def direct() -> list[Requirement]:
    """What the package and its extra `test` ask for themselves, with the extras that they are made of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, lines, pending = project["optional-dependencies"], list(project["dependencies"]), ["test"]
    while pending:
        for requirement in map(Requirement, extras[pending.pop()]):
            if requirement.name == project["name"]:
                pending += requirement.extras
            else:
                lines.append(str(requirement))
    return [Requirement(line) for line in lines]


def test_every_package_of_the_lock_is_pinned_by_hash_and_from_no_place_in_particular() -> None:
    lines = lock()
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[^ ]+( ; .+?)?( +--hash=sha256:[0-9a-f]{64})+ *", line), line[:120]
    assert "://" not in (ROOT / "locks" / "test.txt").read_text()


def test_the_lock_holds_what_pyproject_asks_for_within_its_ranges() -> None:
    versions, requirements = locked(), direct()
    assert {"torch", "transformers", "timm", "torchvision", "setuptools"} <= {item.name for item in requirements}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not locked: make lock"
        assert requirement.specifier.contains(versions[name]), f"{requirement} against {versions[name]}: make lock"


def test_what_is_held_back_is_what_is_locked() -> None:
    held = [Requirement(line) for line in (ROOT / "locks" / "held.txt").read_text().splitlines() if line[:1] != "#"]
    assert held
    for requirement in held:
        assert requirement.specifier.contains(locked()[requirement.name]), f"{requirement}: make lock"


def test_the_minors_of_the_readme_are_those_that_the_library_counts_as_tested() -> None:
    table = re.search(r"<!-- versions -->\n(.*?)<!-- /versions -->", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert table
    (row,) = re.findall(r"^\| `transformers` \| (.*?) \|", table[1], flags=re.MULTILINE)
    passed = [version for version in row.split(", ") if "(" not in version]
    assert tuple(version.rpartition(".")[0] for version in passed) == TESTED, "make minors"
    minor = ".".join(map(str, locked()["transformers"].release[:2]))
    assert minor in TESTED, f"the lock has transformers {minor}, which nobody has tested"
    (floor,) = next(item.specifier for item in direct() if item.name == "transformers")
    assert TESTED[0] == floor.version


def test_the_tests_that_other_versions_are_held_to_exist() -> None:
    program = """
import json, sys
sys.path.insert(0, "bench")
import minors
print(json.dumps({name: one.tests for name, one in minors.LIBRARIES.items()}))
"""
    selected = json.loads(run(sys.executable, "-c", program, folder=ROOT))
    assert set(selected) == {"transformers", "timm", "torch"}
    for files in selected.values():
        for file, names in files.items():
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert set(names) <= defined, file
