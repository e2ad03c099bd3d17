"""What the tests of whole conversions share."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import tiny_runs


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
) -> tiny_runs.Run:
    """A finished run of both stages; not to be written into."""
    return tiny_runs.finished_run(tmp_path_factory, source, tower, shapes)


@pytest.fixture
def convert(source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path) -> tiny_runs.Workshop:
    """A conversion that a test makes wrong in one place."""
    return tiny_runs.workshop(source, tower, shapes, tmp_path)


@pytest.fixture
def whole_plans() -> None:
    """A dry run tells memory too, which takes it seconds."""


@pytest.fixture(autouse=True)
def quick_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run says what each stage does, and leaves out what it takes; but see `whole_plans`."""
    if "whole_plans" not in request.fixturenames:
        monkeypatch.setattr("diffvl.conversion.run.tell_outlook", lambda *_: None)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is not asked (its library has read the environment already), and no run of the checkout is found."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
