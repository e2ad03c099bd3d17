"""Weights written as they come: files of a bounded size, names and index only when all are there."""

from pathlib import Path

import pytest
import torch

from diffvl.errors import DiskError
from diffvl.store import tensorwriter
from diffvl.store.files import read_json
from diffvl.store.tensorfiles import read_headers, read_tensor
from diffvl.store.tensorwriter import TensorWriter


def test_files_are_full_and_have_an_index(tmp_path: Path):
    """40 bytes each, 100 at most in a file; one tensor is larger than that."""
    tensors = {f"t{number}": torch.arange(10.0) + number for number in range(5)} | {"large": torch.ones(50)}
    writer = TensorWriter(tmp_path, 100)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
        assert not list(tmp_path.glob("model*"))
    writer.finish()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)
    ]
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"] == {"total_parameters": 100, "total_size": 400} and index["weight_map"].keys() == tensors.keys()
    headers = read_headers(tmp_path)
    assert all(torch.equal(read_tensor(headers[name]), tensor) for name, tensor in tensors.items())
    assert not list(tmp_path.glob("*.partial*"))


def test_what_fits_is_one_file_without_an_index(tmp_path: Path):
    writer = TensorWriter(tmp_path)
    writer.add("t", torch.ones(2, 3).T)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert read_headers(tmp_path)["t"].shape == (3, 2)


def test_a_full_disk_is_told_and_nothing_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    writer = TensorWriter(tmp_path, 100)
    writer.add("t", torch.ones(20))
    monkeypatch.setattr(tensorwriter, "save_file", full)
    with pytest.raises(DiskError, match="no space is left"):
        writer.add("u", torch.ones(20))
    assert not list(tmp_path.glob("model*"))
