"""python docs/pages.py: writes the pages of docs/ that are made from the sources. tests/test_docs.py says when one is old.

api.md is the docstrings of everything public, settings.md the dataclasses' comments, recipes.md the heads of the recipes, and methods/ has a
page for every file of engine/methods with what it says, its settings and its recipes.
"""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import potstill  # noqa: E402
from potstill.engine import settings  # noqa: E402
from potstill.engine.config.library import find, groups_of, head_of, names  # noqa: E402
from potstill.engine.methods import dmd, gdd, moment_matching, msd, sfd, sida, sim  # noqa: E402
from potstill.engine.recipes import COLUMNS, in_short, title_of  # noqa: E402
from potstill.kernels import compat  # noqa: E402

HEAD = """\
# Everything public

Written by `python docs/pages.py` from the docstrings; the settings of a run are in [settings.md](settings.md).

    from potstill import Estimate, Student, score_match

**Shapes.** Images are `[N, C, H, W]`, N samples of C channels; latents of any number of channels count as images. Where a text says `[N]`, a
number per sample is wanted; where it says `[]`, a tensor without axes.

**Units.** Images are about in [-1, 1]; noise levels sigma, and every constant `c`, are in units of the image (EDM's sigma: x_t = x + sigma·noise).

**Types.** Raw outputs may be float64, float32, bfloat16 or float16, in NCHW or channels-last. Sums are float32 whatever comes in (float64
where anything is), and so are values; a gradient has the dtype and memory format of its tensor.

**Devices.** CUDA tensors run as Triton, or as the CUDA C++ of csrc/ (`set_backend`); CPU tensors as plain PyTorch, which is the definition of both
(`potstill.kernels.reference`). All tensors of a call are on one device. Nothing waits for the GPU, so everything can be captured in a CUDA graph, and works
under `torch.compile(fullgraph=True)`, `torch.inference_mode` and DDP/FSDP.

**Errors.** What does not fit is a `ValueError` that says what was wanted and what came. Second derivatives are not offered by the fused
operations: `potstill.kernels.reference` has every loss for autograd to differentiate as often as wanted.
"""

PAGE: dict[str, list[str]] = {
    "What a network says, and what a loss says": ["Estimate", "Losses"],
    "Losses": ["score_match", "score_implicit", "denoise", "moments", "trajectory", "generator_adversarial", "discriminator_adversarial"],
    "Losses as modules": [
        "ScoreMatchLoss", "ScoreImplicitLoss", "DenoiseLoss", "MomentsLoss", "TrajectoryLoss", "AdversarialLoss",
    ],
    "Noise": ["add_noise"],
    "Nets and optimiser": ["norm_silu", "AdamEMA"],
    "EDM2's nets": [
        "pixel_norm", "pixel_norm_silu", "mp_silu", "mp_sum", "mp_cat_silu", "normalized_weight", "force_weight_norm_",
    ],
    "Students": ["Student", "UserError"],
    "Choosing the implementation": ["set_backend"],
}  # fmt: skip
LABELS = re.compile(r"(Args|Returns|Raises):$")


def page() -> str:
    """docs/api.md."""
    parts, told = [HEAD], set()
    for title, public in PAGE.items():
        parts.append(f"## {title}\n")
        for name in public:
            thing = getattr(potstill, name)
            home = sys.modules[thing.__module__]
            parts.append(f"### `{name}`\n\n{signature(name, thing)}\n{prose(inspect.getdoc(thing))}")
            parts += [fields(thing)] if issubclass_of(thing, tuple) else []
            parts += [method(name, key, value) for key, value in own(thing)]
            if (
                home not in told
                and title not in ("Losses as modules", "Students", "Choosing the implementation")
                and len(home.__doc__ or "") > 200
            ):
                told.add(home)
                parts.append(f"In detail (`{home.__name__}`):\n\n{prose(home.__doc__)}")
    parts.append(f"## Other trainers' names\n\n{prose(compat.__doc__)}")
    for name, thing in vars(compat).items():
        if getattr(thing, "__module__", None) == compat.__name__ and not name.startswith("_"):
            parts.append(f"### `potstill.kernels.compat.{name}`\n\n{signature(name, thing)}\n{prose(inspect.getdoc(thing))}")
            parts += [method(name, key, value) for key, value in own(thing)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def issubclass_of(thing: Any, kind: type) -> bool:
    return inspect.isclass(thing) and issubclass(thing, kind)


def signature(name: str, thing: Any) -> str:
    """`name(x: Tensor, …) -> Losses` as a block of code, a line an argument where it is long."""
    if issubclass_of(thing, Exception):
        return ""
    text = str(inspect.signature(thing))
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    line = name + text
    if len(line) > 110:
        inside, _, after = text[1:].rpartition(")")
        line = f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments(inside)) + f"){after}"
    return f"```python\n{line}\n```\n"


#: Names as the sources write them.
SHORTER = [
    (r"torch\.Tensor", "Tensor"), (r"(collections\.abc|typing|pathlib|numpy)\.", ""), (r"potstill\.[a-z_.]+\.", ""), (r"'(Student)'", r"\1"),
]  # fmt: skip


def arguments(inside: str) -> list[str]:
    """What stands between commas outside of brackets."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(inside):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            found.append(inside[start:at].strip())
            start = at + 1
    return [*found, inside[start:].strip()]


def own(thing: Any) -> list[tuple[str, Any]]:
    """The public methods and properties that a class itself defines."""
    if not inspect.isclass(thing) or issubclass_of(thing, Exception):
        return []
    return [(key, value) for key, value in vars(thing).items() if (not key.startswith("_") or key == "__call__") and described(value)]


def described(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | classmethod)


def method(name: str, key: str, value: Any) -> str:
    if isinstance(value, property):
        return f"**`{name}.{key}`** (property)\n\n{prose(inspect.getdoc(value))}"
    function = value.__func__ if isinstance(value, classmethod) else value
    text = re.sub(r"\((self|cls)(, )?", "(", str(inspect.signature(function)), count=1)
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return f"**`{name}{'' if key == '__call__' else '.' + key}{text}`**\n\n{prose(inspect.getdoc(function))}"


def fields(thing: Any) -> str:
    """The fields of a named tuple with what stands behind them in its source."""
    lines = inspect.getsource(thing).splitlines()
    kind = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
    assert isinstance(kind, ast.ClassDef)
    rows = [node for node in kind.body if isinstance(node, ast.AnnAssign)]
    return "".join(f"* `{ast.unparse(node)}`: {lines[node.lineno - 1].partition('# ')[2]}\n" for node in rows)


def prose(doc: str | None) -> str:
    """A docstring as Markdown: formulas stay blocks of code, Args and Raises become lists."""
    if not doc:
        raise SystemExit("a public name without a docstring")
    found, label = [], ""
    for line in inspect.cleandoc(doc).splitlines():
        if heading := LABELS.match(line.strip()):
            label = heading[1]
            found += ["", f"*{label}*", ""]
        elif label and (item := re.match(r"    ([\w, *]+|[A-Z]\w+): (.*)", line)):
            found.append(f"* {', '.join(f'`{one}`' for one in re.split(', ', item[1]))}: {item[2]}")
        elif label and line.startswith("    "):
            found.append(f"  {line.strip()}")
        else:
            label = "" if line and not line.startswith(" ") else label
            found.append(line)
    return "\n".join(line if line.startswith("    ") else re.sub(r"<(?=\w)", r"\<", line) for line in found) + "\n"


METHODS = [dmd, sim, sida, gdd, moment_matching, sfd, msd]
WRITTEN = "Written by `python docs/pages.py` from"


def method_page(module: ModuleType) -> str:
    """docs/methods/NAME.md: what the file says of its paper, the recipes that train by it, and its settings."""
    name = module.__name__.rpartition(".")[2]
    title, _, about = inspect.cleandoc(module.__doc__ or "").partition("\n")
    title, _, what = title.partition(": ")
    found = [branch for branch in settings.branches() if branch.schema.__module__ == module.__name__]
    if module is msd:
        found = [branch for branch in settings.branches() if branch.title == "students"]
    chosen = [part.split(" ")[0].removeprefix("method=") for branch in found for part in branch.title.split(" | ")]
    recipes = [one for one in names() if groups_of(find(one))["method"] in chosen or (module is msd and "msd" in one)]
    lines = [f"# {title}", "", f"{what[0].upper()}{what[1:]}", "", prose(about)]
    lines += [f"{WRITTEN} [engine/methods/{name}.py](../../engine/methods/{name}.py), which is the method itself.", ""]
    lines += ["## Recipes", "", table_of(recipes, links="../recipes.md")]
    for branch in found:
        lines += [settings.table(branch, f"## {branch.title if module is msd else 'Settings: ' + branch.title}"), ""]
    return "\n".join(lines)


def recipes_page() -> str:
    """docs/recipes.md: an index by data set, then the whole head of every recipe."""
    by_data: dict[str, list[str]] = {}
    for name in names():
        by_data.setdefault(groups_of(find(name))["data"], []).append(name)
    lines = [RECIPES_HEAD.format(count=len(names()), written=WRITTEN)]
    for data, some in by_data.items():
        lines += [f"## {data}", "", f"{title_of(data)}.", "", table_of(some), ""]
    lines += ["## What each says", ""]
    for name in names():
        lines += [f"### {name}", "", "```text", head_of(find(name)).text, "```", ""]
    return "\n".join(lines)


RECIPES_HEAD = """\
# Recipes

{written} the heads of the {count} recipes in configs/. `potstill recipes` has the same in a terminal, `potstill recipes --copy NAME .`
makes a copy to change. *Published* is the paper's number and not ours. *Cost* is the paper's, or arithmetic that says so.
*Run by us* says what was run here, and whether it was a smaller stand-in.
"""


def table_of(recipes: list[str], links: str = "") -> str:
    """A row for every recipe: its name with a link to its head, method, published quality, cost, and what was run by us."""
    rows = ["| recipe | method | published | cost | run by us |", "| --- | --- | --- | --- | --- |"]
    for name in recipes:
        fields = head_of(find(name)).fields
        cells = [f"[{name}]({links}#{name})", f"`{groups_of(find(name))['method']}`", *(in_short(fields[one]) for one in COLUMNS)]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def pages() -> dict[str, str]:
    """Everything that is made, by its path below docs/."""
    methods = {f"methods/{module.__name__.rpartition('.')[2]}.md": method_page(module) for module in METHODS}
    found = {"api.md": page(), "settings.md": settings.page(settings.branches()), "recipes.md": recipes_page()} | methods
    return {path: re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for path, text in found.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        (ROOT / "docs" / path).write_text(text)
