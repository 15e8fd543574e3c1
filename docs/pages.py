"""python docs/pages.py: writes docs/api.md from the docstrings of everything public. tests/test_docs.py says when it is old."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import potstill  # noqa: E402
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
    for title, names in PAGE.items():
        parts.append(f"## {title}\n")
        for name in names:
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


if __name__ == "__main__":
    (ROOT / "docs/api.md").write_text(page())
