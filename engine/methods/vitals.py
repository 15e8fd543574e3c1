"""What methods log beside their losses, so that a run that goes wrong shows it early; `training/health.py` reads it.

Nothing here changes what is trained: no draw is made, no gradient flows, and all is a fixed number of tensors on the device.

    variance_ratio   how varied the student's images are: mean over pixels of the unbiased variance over the images of a
                     micro-batch, 1 is the data's. `variance`, the same undivided, where a run has no images. Images are in [-1, 1].
    gap@σ            how far fake net and teacher disagree about the student's images: λ(σ) mean(D_fake - D_teacher)² with the net's
                     λ, so 1 is as much as the nets' targets vary, at every σ. Means over four equal parts of the law of
                     the noise levels that the student is judged at, each named by its median σ.
    accuracy         share of the discriminator's logits whose sign is right, the mean of generated and real images: 0.5 is a guess.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from potstill.engine.methods.base import Logs
from potstill.kernels import Estimate, denoise

BINS = 4
LIMIT = 8.0  # pixels beyond ± this count as this, so that no image overflows; data is in [-1, 1]


@torch.no_grad()
def variance(x: Tensor, of_data: float | None = None) -> Logs:
    """How varied images x [N, C, H, W] are, beside the data's variance if that is known; {} for a single image.

    Pixels that are not numbers count as 0: non-finite samples are reported elsewhere.
    """
    if len(x) < 2:
        return {}
    found = x.float().clamp(-LIMIT, LIMIT).nan_to_num(0.0).var(0).mean()
    return {"variance": found} if of_data is None else {"variance_ratio": found / of_data}


@torch.no_grad()
def accuracy(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Share of logits whose sign is right; each a sequence of [N, L_n], one tensor for every feature net."""
    right = [(f < 0).float().mean() + (r > 0).float().mean() for f, r in zip(fake, real, strict=True)]
    return torch.stack(right).mean() / 2


@torch.no_grad()
def mean_finite(logits: Tensor) -> Tensor:
    """The mean with 0 for logits that are not finite: the loss leaves them out, and a log value is no reason to stop."""
    return logits.float().nan_to_num(0.0, 0.0, 0.0).mean()


class Gaps:
    """gap@σ of a method whose noise levels are `law(u)` for u uniform on [0, 1], growing with u.

    A part's sum is divided by how many samples it has on average, not by how many it has now. So its mean over micro-batches,
    ranks and iterations is right without counting, and a part without samples is 0, not 0 / 0.
    """

    def __init__(self, law: Callable[[Tensor], Tensor | None], weight: Callable[[Tensor], Tensor]):
        self.weight = weight  # λ
        levels = law((torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096)
        assert levels is not None
        distinct, levels = levels.double().unique(), levels.double()
        cuts = torch.searchsorted(distinct, levels[len(levels) // BINS :: len(levels) // BINS].contiguous()).unique()
        cuts = cuts[cuts > 0]
        self.edges = (distinct[cuts - 1] * distinct[cuts]).sqrt()  # between two levels, so that rounding puts none elsewhere
        part = torch.bucketize(levels, self.edges)
        self.shares = torch.stack([(part == k).double().mean() for k in range(len(self.edges) + 1)])
        self.names = [f"gap@{levels[part == k].median().item():.3g}" for k in range(len(self.shares))]
        self.numbers = torch.arange(len(self.shares), device="cpu")

    @torch.no_grad()
    def __call__(self, real: Estimate, fake: Estimate, sigma: Tensor) -> Logs:
        """Of the teacher's and the fake net's estimates for one batch at levels sigma [N]."""
        gap = denoise(fake, real.denoised(), self.weight(sigma)).value
        if self.edges.device != sigma.device:  # once, before any graph is captured
            self.edges, self.shares, self.numbers = (t.to(sigma.device) for t in (self.edges, self.shares, self.numbers))
        inside = torch.bucketize(sigma.double(), self.edges)[:, None] == self.numbers
        means = (inside * gap[:, None]).mean(0) / self.shares
        return dict(zip(self.names, means.unbind(), strict=True))
