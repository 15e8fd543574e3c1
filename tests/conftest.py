"""What every test starts from: a seed, fresh memory full of NaN, and GPU tests skipped in the open."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    # The longest file first: with --no-loadscope-reorder the other worker takes all the rest meanwhile.
    items.sort(key=lambda item: item.get_closest_marker("parallel") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
