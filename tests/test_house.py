"""The order of the house: who may import whom. This file states it, in one place."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "qlora_min"
# From the top down. A file imports files of its own folder, and of folders that stand further down; "" is the core,
# the files directly in the package. `__init__.py` of the package, a lazy table of public names, stands outside.
ORDER = ("cli", "run", "fused", "scale", "", "data", "ops", "system")
ALONE = "demo"  # imports nothing of ours, and may be imported by all


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(p): p for p in PACKAGE.rglob("*.py")}


def folder(module: str) -> str:
    return module.rpartition(".")[0] if module not in ("", *ORDER, ALONE) else module


def imports(module: str) -> set[str]:
    """The modules of the package that one imports, wherever in its text, by statement."""
    found = set()
    path = MODULES[module]
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "qlora_min"]
            found |= {n.removeprefix("qlora_min").lstrip(".") for n in names}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "qlora_min"):
            inner = (
                (node.module or "").removeprefix("qlora_min").lstrip(".").split(".")
                if not node.level
                else [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            )
            parent = ".".join(filter(None, inner))
            for a in node.names:
                full = f"{parent}.{a.name}".lstrip(".")
                found.add(full if full in MODULES else parent)
    return found - {module, ""}


def test_imports_go_down():
    wrong = []
    for module in MODULES:
        if not module:
            continue
        for other in imports(module):
            here, there = folder(module), folder(other)
            if there == ALONE and here != ALONE:
                continue
            if here == ALONE or ORDER.index(there) < ORDER.index(here):
                wrong.append(f"{module} -> {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_there_is_no_cycle():
    open_, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for other in sorted(imports(module)):
                visit(other)
            open_.pop()
            done.add(module)

    for module in sorted(MODULES):
        visit(module)


def functions() -> list[tuple[str, ast.AST]]:
    """(where it is, definition) of every function and class of the package and the scripts."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    return [
        (f"{path.relative_to(ROOT)}: {node.name}", node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]


def test_the_core_reads_in_an_evening():
    """15 files, 2,200 lines with docstrings, none longer than 250."""
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in PACKAGE.glob("*.py")}
    assert len(lengths) <= 15
    assert max(lengths.values()) <= 250, lengths
    assert sum(lengths.values()) <= 2200, lengths


def test_a_function_fits_on_a_screen():
    """50 lines, 8 parameters (Triton kernels aside); a class has 15 methods and 200 lines at most."""
    wrong = []
    for place, node in functions():
        lines = node.end_lineno - node.lineno + 1
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(n, ast.FunctionDef) for n in node.body)
            wrong += [f"{place}: {methods} methods, {lines} lines"] * (methods > 15 or lines > 200)
            continue
        parameters = len(node.args.args + node.args.kwonlyargs)
        many = parameters > 8 and not place.startswith(("qlora_min/ops/kernels.py", "qlora_min/ops/flash.py"))
        wrong += [f"{place}: {lines} lines, {parameters} parameters"] * (lines > 50 or many)
    assert not wrong, "\n".join(wrong)


def test_the_loop_fits_on_a_screen():
    (loop,) = (node for place, node in functions() if place == "qlora_min/loop.py: train")
    assert loop.end_lineno - loop.lineno + 1 <= 60


def test_no_statements_are_packed_to_save_lines():
    """One statement a line: no semicolons, nothing behind a colon."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        begins = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt) and not isinstance(n, ast.ExceptHandler)]
        assert len(begins) == len(set(begins)), path


def test_each_folder_says_what_it_is_for():
    for folder in {p.parent for p in PACKAGE.glob("*/*.py")}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert 1 <= len(text.splitlines()) <= 4, folder


def test_no_module_hides_a_public_function():
    import qlora_min

    top = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert not top & set(qlora_min.__all__)
