"""One machine for all tests: two threads, a fixed seed, no network."""

import gc
import os

# Read when transformers is imported: a test that asks the hub for a name must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait multiply times where other processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from holdfast import host

# Two processes share two cores where the suite is split (pytest -n 2).
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    # Every Meter collects garbage: it need not look at what imports and earlier modules left.
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def data_dir():
    """The folder of optional data sets; tests that need one skip where it is absent."""
    path = host.data_dir()
    if not path.is_dir():
        pytest.skip(f"no data at {path}; set HOLDFAST_DATA")
    return path
