"""Which tests of this folder run only where they are asked for."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longer set of the sharding strategies."""
    if "slow_strategies" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow_strategies"):
                item.add_marker(pytest.mark.skip(reason="asked for with -m slow_strategies"))
