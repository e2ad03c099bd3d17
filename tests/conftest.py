"""Which process gets the shared fixtures, which stand in support/shared_fixtures.py."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes test, the one that hands the tests out to them tests nothing, and needs not wait for torch."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")
