"""The architecture, and its check: a file imports only from the floors below its own, or from its own package."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Lowest first. Names on one line share a floor and do not see each other.
FLOORS = [
    ["potstill.kernels", "potstill.engine.common"],
    ["potstill.engine.readers"],
    ["potstill.engine.diffusion"],
    ["potstill.engine.nets"],
    ["potstill.engine.data"],
    ["potstill.engine.models"],
    ["potstill.engine.skipping"],
    ["potstill.engine.methods"],
    ["potstill.engine.training", "potstill.engine.formats"],
    ["potstill.engine.measure"],
    ["potstill.engine.config"],
    ["potstill.engine.jobs"],
    ["potstill.engine.train", "potstill.engine.sample", "potstill.engine.evaluate", "potstill.engine.convert", "potstill.engine.probe", "potstill.engine.compare", "potstill.engine.export", "potstill.engine.recipes", "potstill.engine.settings"],
]  # fmt: skip


def room(module: str) -> tuple[int, str] | None:
    """The floor and name of the package or file that a dotted module name lives in; None for other people's code."""
    for floor, names in enumerate(FLOORS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return floor, name
    assert not module.startswith("potstill.engine."), f"{module} has no room in FLOORS"
    return None


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports; `from a import b` counts as a.b so that submodules are seen."""
    package = ("potstill", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    return "potstill." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def violations() -> list[str]:
    found = []
    for path in sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("engine/**/*.py")]):
        here = room(module_name(path)) if module_name(path) != "potstill.engine" else None
        for name in imports(path):
            there = room(name) if name.startswith(("potstill.engine.", "potstill.kernels")) else None
            if here and there and there != here and there[0] >= here[0]:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_imports_go_down():
    assert violations() == []


def imported_files(path: Path, files: dict[str, Path]) -> set[str]:
    """Which of `files` a file imports, also within its functions."""
    found = set()
    for name in imports(path):
        found |= {name, name.rpartition(".")[0]} & files.keys()
    return found - {module_name(path)}


def test_no_file_imports_itself_through_others():
    """Also within a package, and also where the import stands in a function."""
    files = {module_name(path): path for top in ("kernels", "engine") for path in ROOT.glob(f"{top}/**/*.py") if path.stem != "__init__"}
    graph = {name: imported_files(path, files) for name, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"an import circle: {' <- '.join(error.args[1])}") from None


def test_kernels_need_only_torch_and_triton():
    allowed = {"torch", "triton"}
    import sys

    for path in (ROOT / "kernels").glob("*.py"):
        ours = {n for n in imports(path) if n.startswith(("potstill.kernels", "potstill._short_names"))}
        foreign = {n.split(".")[0] for n in imports(path) - ours} - allowed - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_methods_do_not_see_each_other():
    papers = {p.stem for p in (ROOT / "engine/methods").glob("*.py")} - {"__init__", "base", "parts", "vitals", "table"}
    for path in (ROOT / "engine/methods").glob("*.py"):
        seen = {n.split(".")[3] for n in imports(path) if n.startswith("potstill.engine.methods.")}
        assert not seen & (papers - {path.stem}), f"{path.name} imports {seen & papers}"
