"""What a stage asks of accelerate: trackers that are there."""

import pytest

from diffvl.errors import ConfigError
from diffvl.train import launch
from diffvl.train.launch import require_trackers


def installed(patch: pytest.MonkeyPatch, *names: str) -> None:
    patch.setattr(launch, "get_available_trackers", lambda: list(names))


def test_trackers_are_those_named_or_tensorboard_where_it_is(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch)
    assert require_trackers(None) == [] and require_trackers([]) == []
    installed(monkeypatch, "tensorboard", "wandb")
    assert require_trackers(None) == ["tensorboard"]
    assert require_trackers(["wandb"]) == ["wandb"]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, "tensorboard")
    with pytest.raises(ConfigError, match=r"trackers: wandb, mlflow not installed here: pip install wandb mlflow, or"):
        require_trackers(["wandb", "tensorboard", "mlflow"])
