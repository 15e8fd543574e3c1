"""The recipes that come with potstill, each with its data, method, published quality, cost, and what was run by us.

    potstill recipes                      all of them
    potstill recipes cifar10              those whose name begins so; the whole head of one, with its data and method as settings
    potstill recipes --copy ffhq64 .      a copy to be changed: potstill train ffhq64.yaml

What is said comes from the heads of the recipes: the table shows a field up to its first bracket, colon, semicolon or full stop.
"""

import re
import shutil
import textwrap
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError, writing
from potstill.engine.config.library import RECIPES, find, groups_of, head_of, names, text_of

COLUMNS = ("Published", "Cost", "Run by us")  # fields of a head, which every recipe has
NARROWEST = 8  # characters of a column


def main(arguments: list[str]) -> None:
    parser = parser_of("recipes", __doc__)
    parser.add_argument("recipe", nargs="?", help="a name or its beginning, or a path to a .yaml (default: all)")
    parser.add_argument("--copy", nargs=2, metavar=("NAME", "DIR"), help="write NAME.yaml into this folder, never over a file")
    args = parser.parse_args(arguments)
    if args.copy:
        return print(copied(args.copy[0], Path(args.copy[1]).expanduser()))
    some = [name for name in names() if name.startswith(args.recipe or "")]
    if args.recipe and (args.recipe in some or not some):
        return print(in_full(find(args.recipe)))
    print(overview(some, shutil.get_terminal_size((160, 24)).columns))


def copied(name: str, folder: Path) -> str:
    """Copy a recipe into `folder`; returns what to say. Its groups (data, net, method) are found in the package from anywhere."""
    recipe = find(name)
    out = folder / f"{recipe.stem}.yaml"
    if not folder.is_dir():
        raise UserError(f"--copy wants a folder that exists, got {folder}")
    text = re.sub(rf"\b(potstill \w+ {recipe.stem})(?= |$)", r"\1.yaml", text_of(recipe), flags=re.MULTILINE)
    if out.exists():
        raise UserError(f"{out} exists: remove it, or copy into another folder")
    with writing(out), out.open("x", encoding="utf-8") as file:
        file.write(text)
    return f"{out}: change it, then potstill train {out}"


def in_full(recipe: Path) -> str:
    """The head of one recipe as it is written, and its data and method as settings."""
    from omegaconf import OmegaConf

    from potstill.engine.config.tree import load

    cfg = load(recipe, [])
    groups = ", ".join(f"{group}={name}" for group, name in groups_of(recipe).items())
    tree: dict[str, Any] = {"data": cfg.data, "method": cfg.method}
    return f"{recipe.stem}\n\n{head_of(recipe).text}\n\n# {groups}\n{OmegaConf.to_yaml(OmegaConf.create(tree))}".rstrip()


def overview(some: list[str], width: int) -> str:
    """The recipes of these names as a table under the title of each data set, no wider than `width` where that is possible."""
    head, rows = ["recipe", "method", *(field.lower() for field in COLUMNS)], []
    for name in some:
        recipe = find(name)
        groups, fields = groups_of(recipe), head_of(recipe).fields
        rows.append((groups["data"], [name, groups["method"], *(in_short(fields[field]) for field in COLUMNS)]))
    widths = fitting([max(map(len, column)) for column in zip(head, *(row for _, row in rows), strict=True)], width)
    lines = laid_out(head, widths)
    for data, of_data in groupby(rows, key=lambda one: one[0]):
        lines += ["", *textwrap.wrap(f"{data}: {title_of(data)}", width)]
        lines += [line for _, row in of_data for line in laid_out(row, widths)]
    return "\n".join(lines)


def in_short(text: str) -> str:
    """A field up to its first bracket, colon, semicolon or full stop."""
    return re.split(r"[(;:]|\.( |$)", text, maxsplit=1)[0].strip()


def title_of(data: str) -> str:
    """What the file of a data set says it is."""
    lines = (RECIPES / "data" / f"{data}.yaml").read_text(encoding="utf-8").splitlines()
    said = [line.lstrip("# ") for line in lines if line.startswith("# ") and "@package" not in line]
    return re.split(r"\.( |$)|, and a compact", " ".join(said), maxsplit=1)[0]


def fitting(widths: list[int], width: int) -> list[int]:
    """Widths of columns whose sum, with two spaces between them, is at most `width`; the first one, of names, stays."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths[1:]) > NARROWEST:
        widths[1 + widths[1:].index(max(widths[1:]))] -= 1
    return widths


def laid_out(row: list[str], widths: list[int]) -> list[str]:
    """A row of the table as lines: what is longer than its column goes on below."""
    lines = zip_longest(*map(textwrap.wrap, row, widths), fillvalue="")
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


if __name__ == "__main__":
    run(main)
