"""Pictures of any sizes measured at one: FIDs of text-to-image compare them at 256 x 256, whatever a net makes and the data hold."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.data.images import Images, open_images
from potstill.engine.data.pictures import Header
from potstill.engine.data.sources import FileSource, open_source
from potstill.engine.formats.images import fitted, plain
from potstill.engine.measure.features import rgb

LAW = "RGB, the square in the middle, Pillow's Lanczos filter on 8 bits"


class Squares(FileSource):
    """The pictures of another source, each cut and resized when it is read."""

    def __init__(self, source: FileSource, size: int):
        super().__init__(source.files)
        self.labels, self.size = source.labels, size

    def header(self, i: int) -> Header:
        return Header(self.size, self.size, "RGB")

    def picture(self, i: int, *, upright: bool = False) -> Image.Image:
        return square(plain(super().picture(i, upright=upright), 3, self.title(i)), self.size)


def open_resized(path: str, size: int, *, labelled: bool = True) -> Images:
    """Pictures of any sizes as RGB of this one; arrays and latents as `open_images` has them, for `resized`."""
    source = open_source(path, labelled=labelled)
    if not isinstance(source, FileSource):
        return open_images(path, labelled=labelled)
    labels, dim, classes = source.labels or (None, 0, None)
    squares = Squares(source, size)
    return Images(squares, squares.header(0), np.arange(len(source)), labels=labels, label_dim=dim, classes=classes)


def resized(batches: Iterable[Tensor], size: int | None) -> Iterator[Tensor]:
    """[N, 1 or 3, H, W] uint8 -> [N, 3, size, size] on the same device, batch by batch; None: as they are. UserError for other channels."""
    for batch in batches:
        yield batch if size is None else _resized(batch, size)


def _resized(batch: Tensor, size: int) -> Tensor:
    if batch.shape[1] not in (1, 3):
        raise UserError(f"only grey and RGB pictures are resized, got {batch.shape[1]} channels: leave --resize out")
    pictures = rgb(batch).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    squares = np.stack([np.asarray(square(Image.fromarray(one), size)) for one in pictures])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().to(batch.device)


def square(picture: Image.Image, size: int) -> Image.Image:
    return fitted(picture, size, "centre-crop", "lanczos")
