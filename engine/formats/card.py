"""The model card of an exported student: a README.md that says what it is, how good, from what, and how to load it."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from potstill.engine.common.kinds import LONGEST, is_dict
from potstill.engine.common.packages import versions_of
from potstill.engine.formats.caveats import caveats

CC_BY_NC_SA = "CC BY-NC-SA 4.0"
UNKNOWN = (
    "Nothing is recorded about the licence of the teacher's weights or of the data. A student is made from both: look up their "
    "terms before you publish it."
)
HERE = '"."'  # how code in a card names the folder that it is in
MOST_NAMES = 20
TITLES = {
    "dmd": "DMD/DMD2 (arXiv 2311.18828, 2405.14867)",
    "sim": "SIM/SiD (arXiv 2410.16794, 2404.04057)",
    "gdd": "GDD/GDD-I (arXiv 2405.20750)",
    "moment_matching": "moment matching (arXiv 2406.04103)",
    "sfd": "SFD (arXiv 2409.19681)",
    "converted": "others, and converted from their file",
}


@dataclass
class About:
    """What is known about a student. `summary` is its run's summary.json, {} where it was never measured."""

    name: str
    metadata: dict[str, Any]
    nfe: int
    size: str  # "64x64x3, no classes, 61,805,571 parameters"
    students: int = 1
    teacher: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    task: str = "unconditional-image-generation"  # by the hub's name


def card(about: About, library: str, use: str) -> str:
    """The text of README.md; `use` is Markdown on how this format is loaded, `library` the hub's name of what loads it."""
    parts = [_front_matter(about, library), f"# {about.name}", _sentence(about), "## Use", use, *_classes(about)]
    parts += ["## Quality", _quality(about)]
    return "\n\n".join([*parts, "## Made with", _made(about), "## Licence", licence(about.metadata)]) + "\n"


def _classes(about: About) -> list[str]:
    """The names of the classes, where they have some."""
    names = [re.sub(r"([\\\\`*_\[\]<>#|~$&!])", r"\\\1", name) for name in about.metadata.get("classes") or ()]
    some = "; ".join(f"{k} {name}" for k, name in enumerate(names[:MOST_NAMES]))
    more = f" … and {len(names) - MOST_NAMES:,} more (`classes` in the metadata)" if len(names) > MOST_NAMES else ""
    return [f"Classes: {some}{more}."] if names else []


def labels_in_python(label_dim: int, names: list[str] | None, n: int) -> str:
    """n classes of a net as code has them: by names that no other class has, as far as they have some."""
    usable = {name: k for k, name in enumerate(names or ()) if name and len(name) <= LONGEST and (names or []).count(name) == 1}
    chosen = [min(i * label_dim // n, label_dim - 1) for i in range(n)]
    named = {k: name for name, k in usable.items() if k in chosen}
    return f"[{', '.join(repr(named.get(k, k)) for k in chosen)}]"


def licence(metadata: dict[str, Any]) -> str:
    """What the weight file says about the licence it inherited."""
    return metadata.get("license") or UNKNOWN


def _front_matter(about: About, library: str) -> str:
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {about.task}"]
    if CC_BY_NC_SA in licence(about.metadata):
        lines.append("license: cc-by-nc-sa-4.0")
    tags = ["distillation", "one-step" if about.nfe == 1 else "few-step", str(about.metadata.get("method", "potstill"))]
    return "\n".join([*lines, f"tags: [{', '.join(tags)}]", "---"])


def _sentence(about: About) -> str:
    method = str(about.metadata.get("method", "an unknown method"))
    told = "prompts" if about.task == "text-to-image" else "classes"
    several = f"{about.students} students, each for its own {told}, that together are " if about.students > 1 else ""
    steps = "one network evaluation" if about.nfe == 1 else f"{about.nfe} network evaluations"
    teacher = f" from {about.teacher}" if about.teacher else ""
    return f"An image generator ({about.size}): {several}distilled by {TITLES.get(method, method)}{teacher}. An image takes {steps}."


def _quality(about: About) -> str:
    """The Fréchet distances of the run, with what they must be read with."""
    summary = about.summary
    student = summary.get("student") or {}
    if "fd" not in student:
        return _scores(summary) or "Not measured. `potstill evaluate` measures a weight file."
    features, n = student.get("features", "FD"), f"{student['n']:,}" if "n" in student else "?"
    rows = [("real images against themselves (floor)", "", (summary.get("floor") or {}).get("fd"))]
    rows += [(who, (summary.get(who) or {}).get("nfe", ""), (summary.get(who) or {}).get("fd")) for who in ("teacher", "student")]
    table = [f"| | evaluations per image | {features}, n = {n} |", "|---|---|---|"]
    table += [f"| {who} | {nfe} | {_number(fd)} |" for who, nfe, fd in rows if fd is not None]
    images = student.get("reference_images")
    against = f"{images:,} real images of " if images else ""
    told = f"Against {against}{student.get('data', '?')}, seeds {student.get('seeds', '?')}."
    if student.get("best_of", 1) > 1:
        told += f" The student's is the best of {student['best_of']} evaluations with different seeds."
    if features != "FID":
        told += f" {features} is no FID: compare it only with {features} of the same data at the same n."
    for key, title in (("features_sha256", "Features'"), ("reference_sha256", "Reference's")):
        if student.get(key):
            told += f" {title} sha256: `{student[key]}`."
    care = "".join(f"\n* {sentence}" for sentence in caveats(summary))
    return "\n".join(table) + "\n\n" + " ".join(filter(None, [told, _scores(summary)])) + f"\n\nTo be read with care:\n{care}"


def _scores(summary: dict[str, Any]) -> str:
    """The means of a run's scores in a sentence; "" where it has none."""
    names = {"real": "real pictures with their captions", "teacher": "the teacher", "student": "the student"}
    found = {name: (summary.get(who) or {}).get("scores") or {} for who, name in names.items()}
    parts = [f"{name} {', '.join(f'{figure} {_number(mean)}' for figure, mean in means.items())}" for name, means in found.items() if means]
    return f"Means of scores: {'; '.join(parts)}." if parts else ""


def _number(value: float) -> str:
    """Three digits after the point, or three that mean something."""
    return f"{value:.3f}" if value == 0 or not math.isfinite(value) or abs(value) >= 0.01 else f"{value:.3g}"


def _made(about: About) -> str:
    summary, metadata = about.summary, about.metadata
    versions = {"potstill": "unknown"} | versions_of("potstill") | (summary.get("versions") or {})  # unknown: a checkout, not installed
    seconds, seen = summary.get("seconds") or {}, summary.get("images_seen")
    sampler = metadata.get("sampler") or {}
    facts = {
        "method": metadata.get("method"),
        "teacher": about.teacher,
        "data": metadata.get("data"),
        "sampling": _sampling(sampler),
        "images seen": f"{seen['student']:,}" if is_dict(seen) and "student" in seen else None,
        "seconds of training": f"{seconds['student']:,.0f} on {summary.get('device', '?')}" if "student" in seconds else None,
        "precision": summary.get("precision"),
        "seed": summary.get("seed"),
        "source": metadata.get("source"),
        "sha256 of the source": metadata.get("sha256"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return "\n".join(f"* {name}: {fact}" for name, fact in facts.items() if fact not in (None, ""))


def _sampling(sampler: dict[str, Any]) -> str:
    levels = ", ".join(f"{sigma:.4g}" for sigma in sampler.get("sigmas", []))
    return f"{sampler.get('solver', '?')}, noise levels {levels}" + (", first step without the net" if sampler.get("afs") else "")
