"""Fixtures of the kernels' tests."""

import pytest
import torch

from regimes import regime  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
