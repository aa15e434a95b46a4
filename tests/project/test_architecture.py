"""The house rules, read off the syntax trees: who may import whom, what stays lazy, how large things get.

`ARROWS` is the law. A new module is entered there, with the least that it needs, before its first import passes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Who may import whom at any place, inside functions too. A package stands for all of its modules; a module of a package
# without a line of its own has the package's. "*" is everything.
# What adapters know of a session and of the methods that take part: no particular method.
PATCHED = ("session", "hooks", "running", "validate", "methods.base")
ROOMS = (*PATCHED, "upstream", "decoder", "decode", "encoder")
ARROWS = {
    "errors": (),
    "signals": ("errors", "schedule"),
    "reduction": ("errors",),
    "schedule": ("errors",),
    "ops": ("errors", "reduction", "schedule", "ops", "kernels"),
    "methods": ("errors", "signals", "reduction", "schedule", "ops", "methods"),
    "upstream": ("errors", "reduction", "ops", "upstream"),
    "running": ("session",),
    "decoder": ("errors", "signals", "reduction", "ops", *PATCHED, "upstream", "decoder", "decode"),
    "decode": (
        *("errors", "signals", "reduction", "ops", *PATCHED, "upstream", "decode", "decoder.state"),
        *("decoder.call", "decoder.masks", "decoder.pruned_cache"),
    ),
    "encoder": (
        *("errors", "signals", "reduction", "ops", *PATCHED, "upstream", "encoder", "decoder.adapter"),
        "decode.heads",
    ),
    "validate": ("errors", "signals", "reduction", "methods.base"),
    "hooks": ("errors",),
    "session": ("errors", "signals", "hooks", "methods.base"),
    "testing": ("errors", "signals", "reduction", "schedule", "ops", "methods", *ROOMS),
    "api": ("*",),
    "parsing": ("errors", "methods", "api"),
    "report": ("errors", "signals", "schedule", "upstream", "report"),
    "report.compare": ("errors", "schedule", "methods.base", "api", "parsing", "upstream", "report"),
    "report.tables": (),
    "cli": ("", "errors", "api", "methods", "parsing", "report", "upstream"),
    "__main__": ("cli",),
    "": ("*",),  # tokenprune/__init__.py
    "kernels": ("kernels",),
}
# Who may import whom beyond that, in a function or for types: the other direction exists, or it is rarely wanted.
LAZY_ARROWS = {
    "report": ("session",),
    "session": ("report",),
    "hooks": ("session",),
    "testing": ("*",),
}
# Third parties: what runs on `import tokenprune`, and what a function may ask for when it is called.
REQUIRED = {"numpy", "torch"}
OPTIONAL = {"accelerate", "matplotlib", "PIL", "timm", "tqdm", "transformers", "triton"}
KERNELS_MAY = {"torch", "triton"}

# Aimed at are 300 lines in a file and 50 in a function; a little above that is where a test may stand in the way.
# A function's docstring is not counted: nobody is to save on it.
FILE_LINES, FUNCTION_LINES = 320, 60


@dataclass(frozen=True)
class Import:
    """One import of one module: `lazy` inside a function, `typed` where it serves the type checker alone."""

    module: str
    line: int
    lazy: bool
    typed: bool


def name_of(path: Path) -> str:
    """Dotted name of a file below `tokenprune` or `kernels`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["tokenprune", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for folder in ("tokenprune", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}
MODULES = pytest.mark.parametrize("module", FILES)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def targets(node: ast.AST) -> list[str]:
    """Modules that a statement or a call imports, by their dotted names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return list(dict.fromkeys(name if name in FILES else str(node.module) for name in inner))
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def imports(module: str) -> Iterator[Import]:
    """Every import in the file of `module`."""

    def visit(node: ast.AST, lazy: bool, typed: bool) -> Iterator[Import]:
        for target in targets(node):
            yield Import(target, node.lineno, lazy, typed)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = typed or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typed)

    return visit(tree_of(module), False, False)


def inner(module: str) -> str | None:
    """Name of a module below `tokenprune`; None for others."""
    return module.partition(".")[2] if module.split(".")[0] == "tokenprune" else None


def rule(table: dict[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    """What `table` says of a module or, failing that, of its package."""
    return table.get(name, table.get(name.partition(".")[0], ()))


def covered(name: str, allowed: tuple[str, ...]) -> bool:
    return "*" in allowed or any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


def test_every_module_has_its_line_in_the_law() -> None:
    known = {name.partition(".")[0] for name in map(inner, FILES) if name is not None}
    assert known == {name.partition(".")[0] for name in ARROWS}


@MODULES
def test_imports_follow_the_arrows(module: str) -> None:
    name = inner(module)
    assert name is not None
    wrong = []
    for found in imports(module):
        target = inner(found.module)
        allowed = rule(ARROWS, name) + (rule(LAZY_ARROWS, name) if found.lazy or found.typed else ())
        if target is not None and not covered(target, allowed):
            wrong.append(f"{FILES[module].relative_to(ROOT)}:{found.line} imports {found.module}")
    assert not wrong


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {
        module: {found.module for found in imports(module) if found.module in FILES and not (found.lazy or found.typed)}
        for module in FILES
    }
    TopologicalSorter(graph).prepare()


@MODULES
def test_third_parties_are_imported_where_they_may_be(module: str) -> None:
    kernel = FILES[module].is_relative_to(ROOT / "kernels")
    wrong = []
    for found in imports(module):
        root = found.module.partition(".")[0]
        if root in sys.stdlib_module_names or root == "tokenprune":
            continue
        if root not in (KERNELS_MAY if kernel else REQUIRED | OPTIONAL if found.lazy or found.typed else REQUIRED):
            wrong.append(f"{FILES[module].relative_to(ROOT)}:{found.line} imports {found.module}")
    assert not wrong


@MODULES
def test_private_names_stay_in_their_file(module: str) -> None:
    """A name with an underscore is imported by nobody, and read of things that its own file makes (or that belong to
    others) alone."""
    tree = tree_of(module)
    nodes = list(ast.walk(tree))
    own = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    everywhere = {name for names in private_names().values() for name in names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tokenprune"):
            assert not [alias.name for alias in node.names if is_private(alias.name)], f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | UPSTREAM:
            assert node.attr not in everywhere, f"line {node.lineno}: {ast.unparse(node)}"


UPSTREAM = {"_attn_implementation", "_replicate_for_data_parallel"}  # private there, and overridden here


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def private_names() -> dict[str, set[str]]:
    """For each file the private names that it gives to functions, classes, fields and attributes."""
    found: dict[str, set[str]] = {}
    for module in FILES:
        nodes = list(ast.walk(tree_of(module)))
        names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found[module] = {name for name in names if is_private(name)}
    return found


@MODULES
def test_library_prints_nothing(module: str) -> None:
    if inner(module) == "cli":  # it is there to print
        return
    calls = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@MODULES
def test_files_and_functions_are_of_a_size_to_be_read(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    long = {module: lines} if lines > FILE_LINES else {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = length(node) - (length(node.body[0]) if ast.get_docstring(node) is not None else 0)
            if lines > FUNCTION_LINES:
                long[node.name] = lines
    assert long == {}


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def texts() -> Iterator[Path]:
    """The text files of the checkout, without what is made in it."""
    made = re.compile(r"\.(?!ci$|github$|gitignore$).*|out|build|dist|__pycache__|.*\.egg-info")
    pending = [ROOT]
    while pending:
        path = pending.pop()
        if path.is_dir():
            pending += [child for child in sorted(path.iterdir()) if not made.fullmatch(child.name)]
        else:
            with path.open("rb") as file:
                if b"\0" not in file.read(4096):
                    yield path


def test_no_text_carries_a_path_of_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(?<![\w.~$})/-])/(?:work|tmp|home|root|Users|mnt|scratch)/\w+")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in texts()
        for match in machine.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
