"""A generator as one graph, (z, labels) to images: by torch.export, and from there ONNX for runtimes without PyTorch."""

# onnxruntime is optional.
# pyright: reportMissingImports=false

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from potstill.engine.common.errors import UserError

Example = tuple[Tensor, ...]


def program(generator: nn.Module, example: Example) -> ExportedProgram:
    """The graph of `generator(*example)` for any batch size; `example` has a batch of two or more."""
    with torch.no_grad():
        return torch.export.export(generator, example, dynamic_shapes=[{0: Dim("batch")} for _ in example])


def write_onnx(generator: nn.Module, example: Example, names: tuple[str, ...], path: Path) -> None:
    """`path`, an ONNX file with inputs `names` and one output, "images". UserError where the packages are missing."""
    if lacking := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"--to onnx wants the package {' and '.join(lacking)}: pip install 'potstill[onnx]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxscript's own, about itself
        torch.onnx.export(
            program(generator, example), (), path, input_names=list(names), output_names=["images"],
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


def largest_difference(path: Path, generator: nn.Module, example: Example, names: tuple[str, ...]) -> float | None:
    """How far onnxruntime's images are from PyTorch's, at most, for a batch of another size; None where it is missing."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = [torch.cat([part, part[:1]]) for part in example]
    (found,) = session.run(None, {name: part.numpy() for name, part in zip(names, batch, strict=True)})
    with torch.no_grad():
        return float((torch.from_numpy(found) - generator(*batch)).abs().max())
