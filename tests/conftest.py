"""The order of the tests, which pytest-xdist keeps (see the Makefile)."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that at the end no process is left alone with one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
