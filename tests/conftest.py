"""What every test shares: no network, fixed seeds, and on request poisoned memory and the default model."""

import os

# Both libraries read these once, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HEEDFUL_DEFAULT_MODEL", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # and so in the processes that tests start: workers share the cores
# HEEDFUL_DEVICE=cuda: where the tests of kernels for GPUs are to run
os.environ["TRITON_INTERPRET"] = "0" if "HEEDFUL_DEVICE" in os.environ else "1"

import gc
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from heedful import gpu, models

if not gpu.missing():
    import triton  # noqa: F401  its language is made to be interpreted, or not, when it is imported
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    # A launch has the language interpreted; each function that a kernel calls would see to it again, for a third of all
    _patch_lang(standard.zeros.fn)  # whose module names the language otherwise than kernels do
    InterpretedFunction.__call__ = lambda called, *given, **named: called.rewrite()(*given, **named)
del os.environ["TRITON_INTERPRET"]  # nothing but test_triton.py runs there

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # clocks tell of others
settings.load_profile("busy")


# torch.manual_seed asks after every kind of device, and writes down who asked: 3 % of the time of all tests
SEED = torch.manual_seed if "HEEDFUL_DEVICE" in os.environ else torch.default_generator.manual_seed


def pytest_collection_finish() -> None:
    """Modules and tests stay: who looks for what is left over, as some tests do, need not look at all of them."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    SEED(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory holds NaN (the greatest value in integer tensors), so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def default_model() -> models.Loaded:
    """The embedded model, one for all tests of a process: leave it as it was."""
    return models.default()
