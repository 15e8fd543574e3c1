"""The results in README.md and docs/ come from files under benches/results/, and from nowhere else.

    python -m benches.scripts.readme           rewrites every marked section of both
    python -m benches.scripts.readme --check   fails if a section differs from its file, or holds a number that its file does not

A section stands between `<!-- results:KIND FOLDER -->` and `<!-- /results -->`. KIND: sida (digits.json), few_steps (few_steps.json), demo (summary.json), compare and night
(compare.json), time (time_to_quality.json), scaling (scaling.json), skipping (skipping.json), ladder (ladder.json), quality
(ladder_quality.json), soak (faults.json, before.json), endurance (endurance.json), fuzz (readers.json, before.json), gpu (no FOLDER: the newest folder of every GPU, or the sentence that there is none). A number is sourced
if it is one in the file, in units, thousands, millions or billions (or GiB of bytes), rounded as shown.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches import RESULTS, ROOT
from benches.scripts import gpu_section, sections

MARKED = re.compile(r"(<!-- results:([^>]*?) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 and say what is wrong")
    parser.add_argument(
        "--readme", type=Path, nargs="+", default=[ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], metavar="PAGE"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    texts = {page: page.read_text() for page in args.readme}
    wrong = [f"{page.name}: {line}" for page, text in texts.items() for line in problems(text, args.results)]
    if args.check and not wrong:
        old = [(page, name) for page, text in texts.items() for name in stale(text, args.results)]
        wrong += [f"{page.name}: section {name!r} is not what its file says: run python -m benches.scripts.readme" for page, name in old]
    if wrong:
        sys.exit("\n".join(wrong))
    for page, text in texts.items() if not args.check else []:
        page.write_text(rewritten(text, args.results))


def rewritten(text: str, results: Path) -> str:
    return MARKED.sub(lambda m: m[1] + section(m[2], results)[0] + m[4], text)


def stale(text: str, results: Path) -> list[str]:
    return [m[2] for m in MARKED.finditer(text) if m[3] != section(m[2], results)[0]]


def problems(text: str, results: Path) -> list[str]:
    """Sections without a file, and numbers that a section would hold and its file does not."""
    found = []
    if text.count("<!-- results:") != len(MARKED.findall(text)):
        found.append("a marker <!-- results:… --> has no <!-- /results --> after it, or stands in the middle of a line")
    for match in MARKED.finditer(text):
        try:
            wanted, sources = section(match[2], results)
        except (OSError, KeyError, ValueError) as error:
            found.append(f"section {match[2]!r} has no source: {type(error).__name__}: {error}")
            continue
        found += [f"section {match[2]!r}: {n} is in no source file" for n in unsourced(wanted, sources)]
    return found


def section(name: str, results: Path) -> tuple[str, list[Any]]:
    """The text of a section, and the contents of the files it comes from. ValueError for an unknown kind."""
    kind, _, folder = name.partition(" ")
    if kind == "gpu":
        return gpu_section.section(results)
    if kind not in sections.KINDS:
        raise ValueError(f"wanted one of gpu, {', '.join(sections.KINDS)}, got {kind!r}")
    *files, write = sections.KINDS[kind]
    sources = [json.loads((results / folder / file).read_text()) for file in files]
    return write(*sources), sources


def unsourced(text: str, sources: list[Any]) -> list[str]:
    """The numbers of a text that are in none of the sources."""
    known = [x for source in sources for x in numbers(source)]
    return [token for token in NUMBER.findall(text) if not any(shows(token, x) for x in known)]


def shows(token: str, value: float) -> bool:
    """Is this the value, rounded to the digits of the token?"""
    digits = token.partition("e")[0].partition(".")[2]
    shown = float(token.replace(",", ""))
    units = (1, 1e3, 1e6, 1e9, 2**30) if shown else (1,)  # in billions everything is 0
    return any(abs(value / unit - shown) <= 0.5000001 * 10.0 ** -len(digits) for unit in units)


def numbers(source: Any) -> Iterator[float]:
    """Every number of a JSON value, those in its keys and texts included."""
    if isinstance(source, bool) or source is None:
        return
    if isinstance(source, int | float):
        yield source
    elif isinstance(source, str):
        yield from (float(token.replace(",", "")) for token in NUMBER.findall(source))
    else:
        for value in [*source, *source.values()] if isinstance(source, dict) else source:
            yield from numbers(value)


if __name__ == "__main__":
    main(sys.argv[1:])
