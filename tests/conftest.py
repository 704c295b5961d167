import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)  # the machine may be busy
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def shipped_costs(tmp_path_factory):
    """Costs that were tuned on this machine would choose other ways of computing attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws without a seed of its own is the same whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """The models of the tests are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
