"""Which process gets the shared fixtures, which stand in support/shared_fixtures.py."""

import pytest
from slow_cases import SLOW_CASES


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes test, the one that hands the tests out to them tests nothing, and needs not wait for torch."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `make test` leaves to `make test-slow`; see support/slow_cases.py."""
    for item in items:
        if item.nodeid.endswith(SLOW_CASES):
            item.add_marker(pytest.mark.slow)
