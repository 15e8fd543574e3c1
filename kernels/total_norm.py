"""The norm of a gradient that lies in many tensors, √Σ g², in one pass over memory and one call.

Definition: torch.nn.utils.get_total_norm. It also is what runs, but for dense float32 tensors on a CPU, which csrc/ sums in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from potstill.kernels import native
from potstill.kernels.tables import dense


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all of them as one vector, 0-dim on their device."""
    if not (gradients and native.used() and all(_taken(g) for g in gradients)):
        return get_total_norm(gradients)
    table = torch.tensor([[g.data_ptr() for g in gradients], [g.numel() for g in gradients]], dtype=torch.int64, device="cpu")
    norm = torch.empty((), dtype=torch.float32, device="cpu")
    native.library().total_norm(table, norm)
    return norm


def _taken(g: Tensor) -> bool:
    return g.dtype is torch.float32 and g.is_cpu and type(g) is Tensor and dense(g)
