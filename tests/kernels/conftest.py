"""Fixtures of the kernels' tests."""

from regimes import regime  # noqa: F401 - a fixture
