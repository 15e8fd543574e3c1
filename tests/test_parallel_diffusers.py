"""Nets of diffusers on several ranks: what one rank does with the same prompts, and checkpoints that either reads of the other."""

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers_cases as cases
import diffusers_models
from test_parallel import world

from potstill.engine.training.parallel import FSDPConfig

pytestmark = pytest.mark.parallel

DDP, FSDP, SHARD = {"parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "fsdp", "fsdp": FSDPConfig(teacher="shard")}
#: (name, method, iterations, settings). A GAN's features are from half of a net, whose root and first blocks are sharded apart.
JOBS = [
    ("sd15", "sim", 2, DDP),
    ("sd15", "gan", 3, SHARD),
    ("dit", "gan", 3, FSDP),
    ("dit", "lognormal", 2, DDP),
    ("pixart", "gan", 3, DDP),
    ("pixart", "sim", 2, SHARD | {"activation_checkpointing": "blocks"}),
    ("sd3", "few", 5, DDP),
    ("sd3", "moments", 2, SHARD),
    ("flux", "sfd", 2, DDP),
    ("flux", "gan", 3, SHARD),
    ("qwen", "few", 3, FSDP),  # the last three have positions that are no weights
    ("lumina2", "few", 3, FSDP),
    ("wan", "few", 3, FSDP),
]


def told(job) -> str:
    name, method, _, settings = job
    return "-".join([name, method, settings["parallel"], *["shard"] * ("fsdp" in settings), *["recomputed"] * (len(settings) > 2)])


#: Three iterations on two ranks one way, two the other, one in one process.
ENDS = [("fsdp", "ddp"), ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All that two processes do: the jobs by what they are called, the curves of each of ENDS with the folder of its checkpoints, and
    which nets in 16 bit are others in shards."""
    folders = {modes: str(tmp_path_factory.mktemp("-".join(modes))) for modes in ENDS}
    parts = [("pixart", "few", folders[modes], mode, steps) for modes in ENDS for mode, steps in zip(modes, (3, 2), strict=True)]
    pipelines = {name: str(diffusers_models.folder(name, tmp_path_factory.mktemp(name))) for name in ("wan", "sd3")}
    made = world(tmp_path_factory.mktemp("two"), 2, "diffusers_cases.run_all", JOBS, parts, pipelines, preload=["diffusers_cases"]).result
    found = dict(zip(map(told, JOBS), made[0], strict=True))
    curves = [a + b for a, b in zip(made[1][::2], made[1][1::2], strict=True)]
    return found | {modes: (curve, folders[modes]) for modes, curve in zip(ENDS, curves, strict=True)} | {"changed": made[2]}


@pytest.mark.parametrize("job", JOBS, ids=told)
def test_two_ranks_do_what_one_does(two_ranks, job):
    """Every logged number, the weights, and what the average makes of four states: a position that was lost shows there alone."""
    name, method, steps, _ = job
    run, feed = cases.new_run(name, method)
    curve = cases.advance(run, feed, steps)
    ours, our_weights, drawn = two_ranks[told(job)]
    for step, (wanted, got) in enumerate(zip(curve, ours, strict=True)):
        assert wanted.keys() == got.keys(), step
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=2e-5, abs=1e-5), f"{key} at iteration {step}"
    for key, value in cases.weights(run).items():
        torch.testing.assert_close(our_weights.pop(key), value, rtol=0, atol=3e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert not our_weights
    wanted = cases.D(run.average(), name)
    assert (drawn - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("modes", ENDS, ids="-".join)
def test_shards_and_whole_files_go_on_from_each_other(two_ranks, modes):
    """A net has buffers, such as positions and the null prompt, that belong to no checkpoint."""
    run, feed = cases.new_run("pixart", "few")
    curve, folder = two_ranks[modes]
    curve = curve + cases.part(cases.ALONE, "pixart", "few", folder, "ddp", 1)
    for one, other in zip(cases.advance(run, feed, 6), curve, strict=True):
        assert other == pytest.approx(one, rel=2e-5, abs=1e-5)


def test_teachers_of_16_bit_are_gathered_as_they_are(two_ranks):
    """Wan's class keeps some of its weights in 32."""
    assert two_ranks["changed"] == []
