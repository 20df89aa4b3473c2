"""What all test files share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices as small as the tests' only wait for one another on several threads."""
    torch.set_num_threads(1)
