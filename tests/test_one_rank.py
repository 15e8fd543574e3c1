"""One process that does all that several do: process groups, all-reduces and shards of one, with the numbers of a run without.

It is how what only NCCL is asked can be tried on a machine with one GPU.
"""

import parallel_cases as cases
import pytest
import torch
import torch.distributed as dist

from benches.rehearse import GPU
from potstill.engine.training.parallel import FSDPConfig, Sharded
from potstill.engine.training.ranks import ALONE, Ranks

STEPS = 2
JOBS = [
    *((name, "ddp", {}) for name in cases.METHODS), *((name, "fsdp", {}) for name in cases.METHODS),
    ("dmd", "ddp", {"micro_batch": 4}), ("sim", "fsdp", {"fsdp": FSDPConfig(reshard_after_forward=False, teacher="shard"), "micro_batch": 4}),
]  # fmt: skip


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def one(request):
    """The rank, and its device: gloo's or NCCL's."""
    convolutions = torch.backends.cudnn.conv
    before = torch.backends.cudnn.deterministic, convolutions.fp32_precision
    torch.backends.cudnn.deterministic, convolutions.fp32_precision = True, "ieee"
    ranks = Ranks(store=dist.HashStore(), several=True)
    try:
        yield ranks, ranks.connect(torch.device("cpu") if request.param == "cpu" else GPU)
    finally:
        ranks.close()
        torch.backends.cudnn.deterministic, convolutions.fp32_precision = before
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def alone(one):
    """Curve and weights of a run without ranks, by method and micro-batch."""
    found = {}

    def of(name, micro):
        if (name, micro) not in found:
            run = cases.new_run(name, ALONE, device=one[1], micro_batch=micro)
            found[name, micro] = cases.advance(run, STEPS), cases.weights(run)
        return found[name, micro]

    return of


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, cases.key(*job))))
def test_a_world_of_one_gives_the_numbers_of_no_world(one, alone, job, monkeypatch):
    """To the bit where nets are whole and nothing is computed in another way; GDD's batch norms over all ranks are."""
    (ranks, device), (name, parallel, settings) = one, job
    called = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *given, **named: called.append(1) or reduce(*given, **named))
    run = cases.new_run(name, ranks, parallel, device=device, **settings)
    assert any(isinstance(net, Sharded) for net in run.trained.values()) == (parallel == "fsdp") and run.graphs is None
    curve, weights = cases.advance(run, STEPS), cases.weights(run)
    assert called
    wanted, wanted_weights = alone(name, settings.get("micro_batch"))
    tolerance = 0.0 if (parallel, device.type) == ("ddp", "cpu") and "gdd" not in name else 1e-5 if device.type == "cpu" else 1e-4
    for step, (a, b) in enumerate(zip(wanted, curve, strict=True)):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=tolerance, abs=tolerance), f"{key} at iteration {step}"
    assert weights.keys() == wanted_weights.keys()
    for key, value in wanted_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def test_a_world_of_one_speaks_with_itself(one):
    ranks, device = one
    assert ranks.agree({"a": 1}) == {"a": 1} and ranks.on_first(lambda: 3) == 3 and ranks.least(5) == 5
    assert ranks.stop(15) == 0 and ranks.stop(0) == 15 and ranks.stop(0) == 0
    ranks.wait()
    tensors = [torch.full((3,), 2.0, device=device), torch.ones(2, dtype=torch.float64, device=device)]
    ranks.average(tensors)
    assert [t.tolist() for t in tensors] == [[2.0, 2.0, 2.0], [1.0, 1.0]]
    assert ranks.total(torch.ones(2, device=device)).tolist() == [1.0, 1.0]
    assert "nccl" in dist.distributed_c10d.get_backend_config() or device.type == "cpu"
