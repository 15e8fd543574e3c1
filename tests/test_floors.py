"""The architecture, and its check: a file imports only from the floors below its own, or from its own package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Lowest first. Names on one line share a floor and do not see each other.
FLOORS = [
    ["kernels", "engine.errors", "engine.strata", "engine.whole", "engine.written"],
    ["engine.checks", "engine.diffusion", "engine.cli"],
    ["engine.nets"],
    ["engine.sampling", "engine.skipping"],
    ["engine.methods"],
    ["engine.training", "engine.data", "engine.formats"],
    ["engine.evaluation"],
    ["engine.config"],
    ["engine.build", "engine.folder", "engine.student", "engine.unused"],
    ["engine.preflight"],
    ["engine.planned"],
    ["engine.job"],
    ["engine.rehearsal"],
    ["engine.train", "engine.sample", "engine.evaluate", "engine.convert", "engine.probe", "engine.compare", "engine.export"],
]  # fmt: skip


def room(module: str) -> tuple[int, str] | None:
    """The floor and name of the package or file that a dotted module name lives in; None for other people's code."""
    for floor, names in enumerate(FLOORS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return floor, name
    assert not module.startswith("engine."), f"{module} has no room in FLOORS"
    return None


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports; `from a import b` counts as a.b so that submodules are seen."""
    package = path.relative_to(ROOT).parent.parts
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
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def violations() -> list[str]:
    found = []
    for path in sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("engine/**/*.py")]):
        here = room(module_name(path)) if module_name(path) != "engine" else None
        for name in imports(path):
            there = room(name) if name.startswith(("engine.", "kernels")) else None
            if here and there and there != here and there[0] >= here[0]:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_imports_go_down():
    assert violations() == []


def test_kernels_need_only_torch_and_triton():
    allowed = {"torch", "triton", "kernels"}
    import sys

    for path in (ROOT / "kernels").glob("*.py"):
        foreign = {n.split(".")[0] for n in imports(path)} - allowed - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_methods_do_not_see_each_other():
    papers = {p.stem for p in (ROOT / "engine/methods").glob("*.py")} - {"__init__", "base", "parts"}
    for path in (ROOT / "engine/methods").glob("*.py"):
        seen = {n.split(".")[2] for n in imports(path) if n.startswith("engine.methods.")}
        assert not seen & (papers - {path.stem}), f"{path.name} imports {seen & papers}"
