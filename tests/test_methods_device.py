"""A method built of a teacher on a GPU lies there with all that it holds. `meta` stands in for a GPU that is not here."""

import pytest
import torch

from potstill.engine.methods.base import modules_of
from potstill.engine.methods.table import METHODS
from potstill.engine.nets.edm import from_kwargs

SETTINGS = {
    "dmd": {}, "dmd2": {"name": "dmd", "gan": True}, "sim": {}, "moment_matching": {}, "instant": {"name": "moment_matching", "variant": "instant"},
    "gdd": {}, "gdd_i": {"name": "gdd", "freeze": 1}, "sfd": {}, "sfd_v": {"name": "sfd", "num_steps": [4, 5], "step_condition": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_no_view_is_left_on_the_cpu(name):
    """A frozen view shares its net's tensors: one that was made before the net moved would keep the old ones."""
    with torch.device("meta"):
        teacher = from_kwargs(
            "EDMPrecond", img_resolution=8, img_channels=1, label_dim=3, model_type="SongUNet", model_channels=8, channel_mult=[1, 1],
            num_blocks=1, attn_resolutions=[],
        )  # fmt: skip
    settings = {"name": name} | SETTINGS[name]
    method = METHODS[settings["name"]](**settings).build(teacher, teacher)
    for net in method.nets.values():  # as a run does
        net.to("meta")
    for module in [*method.nets.values(), *modules_of(method)]:
        assert {p.device.type for p in module.parameters()} <= {"meta"}, type(module).__name__
        assert {b.device.type for b in module.buffers()} <= {"meta"}, type(module).__name__
