"""What every test starts from: a seed, no network, and GPU tests skipped in the open, or rehearsed.

With POTSTILL_REHEARSE=1 (benches/rehearse.py) tests marked gpu run on the CPU, of each test and implementation the smallest
case: kernels under TRITON_INTERPRET=1, by the interpreter and by csrc/ compiled as C++ (test_csrc.py), the rest without it.
"""

import functools
import gc
import math
import socket

import pytest

# What these assert shows its values as the assertions of a test do.
pytest.register_assert_rewrite("kernel_cases", "parallel_cases", "patience", "places", "toy")


def of_this_machine(function, host):
    """`function` of a socket, as long as `host` of its arguments is an address of this machine: nothing here, not even an
    import, may want another."""

    def guarded(*arguments, **options):
        if (name := host(*arguments)) not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()):
            pytest.fail(f"no test reaches for the network, this one for {name}")
        return function(*arguments, **options)

    return guarded


socket.getaddrinfo = of_this_machine(socket.getaddrinfo, lambda host, *rest: host)
for word in ("connect", "connect_ex"):
    # A Unix socket's address is a path, and of this machine.
    guard = of_this_machine(getattr(socket.socket, word), lambda _, address: address[0] if isinstance(address, tuple) else None)
    setattr(socket.socket, word, guard)

import torch  # noqa: E402

from benches.rehearse import GPU, REHEARSING, THERE  # noqa: E402
from potstill.kernels._lib import INTERPRET  # noqa: E402

if REHEARSING:
    from test_csrc import BUILT, compiled  # noqa: F401  a fixture

#: What a rehearsal says at the end; from every worker of pytest-xdist the same.
SAID = set()
#: csrc/ compiled for the CPU, in a rehearsal: its ops, once they are loaded.
CSRC = []
# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 2.3 warns of and 2.4 refuses.
NUMPY = "ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning:triton.runtime.interpreter"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", NUMPY)


def pytest_collection_modifyitems(config, items):
    # The longest file first: with --no-loadscope-reorder the other worker takes all the rest meanwhile.
    items.sort(key=lambda item: item.get_closest_marker("parallel") is None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    for item in on_gpu:
        # A deprecation in a library must not cost what a GPU was lent for; ours are errors on CPUs.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not THERE:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if REHEARSING and on_gpu:
        kept = smallest(on_gpu)
        SAID.add(f"rehearsal: {len(kept)} of {len(on_gpu)} gpu tests, the smallest case of each and every implementation")
        left_out = [item for item in on_gpu if item not in kept]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def smallest(items):
    """One item of each test function and implementation, or op: that of the fewest numbers, else the first."""
    kept = {}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        key = item.path, item.originalname, given.get("op", given.get("place"))
        shape = getattr(given.get("case"), "shape", ())
        size = math.prod(shape) or math.inf  # of nothing there is nothing to see
        if key not in kept or size < kept[key][0]:
            kept[key] = size, item
    return {item for _, item in kept.values()}


def pytest_collection_finish(session):
    # Libraries and tests live to the end: looking through them for garbage took a fifth of some files' time.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["said"] = sorted(SAID)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    SAID.update(getattr(node, "workeroutput", {}).get("said", ()))


def pytest_terminal_summary(terminalreporter):
    for line in sorted(SAID):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(kind, seed=0): a tiny pipeline of diffusers, made when it is asked for."""
    import diffusers_pipelines

    root = tmp_path_factory.mktemp("pipelines")
    return functools.cache(lambda kind, seed=0: diffusers_pipelines.folder(kind, root / (f"{kind}-{seed}" if seed else kind), seed))


@pytest.fixture(scope="module")
def pipelines(folders):
    """pipelines(kind): the same, SD's with a scaling that suits its random VAE."""
    import diffusers_pipelines

    return functools.cache(lambda kind: diffusers_pipelines.scaled(folders(kind), 3.5) if kind == "sd15" else folders(kind))


@pytest.fixture
def place(request, monkeypatch):
    """The device of a kernel test's tensors; on the GPU with the implementation chosen that the test is about (places.py)."""
    if request.param == "cpu":
        return torch.device("cpu")
    if REHEARSING and not INTERPRET:
        pytest.fail("a rehearsal of kernels wants TRITON_INTERPRET=1")
    monkeypatch.setattr("potstill.kernels.cuda._backend", request.param)
    if REHEARSING and request.param == "cuda":
        import fcntl  # which Windows lacks

        if not CSRC:  # once a process: another process may put a new file there, and its ops cannot be defined twice
            BUILT.mkdir(parents=True, exist_ok=True)
            with (BUILT / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds it compiled
                CSRC.append(request.getfixturevalue("compiled"))
        monkeypatch.setattr("potstill.kernels.cuda.library", lambda: CSRC[0])
    return GPU


@pytest.fixture
def taken(monkeypatch):
    """What every iteration takes: (images, captions, prompts)."""
    from potstill.engine.training.run import Run

    found, take = [], Run.take

    def noted(self, *batch):
        found.append(batch)
        return take(self, *batch)

    monkeypatch.setattr(Run, "take", noted)
    return found
