"""The published data: fetched from a hub on this machine, checked, and kept; or drawn in the same form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import Hub, hub_of

from diffvl.config.sources import DataSource
from diffvl.data.records import Record
from diffvl.data.source_records import parse_source
from diffvl.data.sources import find_source
from diffvl.errors import DataError, DiskError
from tools import llava_data
from tools.llava_data import INSTRUCT, PRETRAIN, HubSet, fetch, instructions, is_fetched, pretraining

ROOT = Path(__file__).parents[2]
# Its client reads the hub's address when it is imported. Each line of the arguments is a set, its patterns and a folder.
PROGRAM = """
import json, sys
from pathlib import Path
from diffvl.errors import DiffvlError
from tools.llava_data import HubSet, fetch
for repo, patterns, folder in json.loads(sys.argv[1]):
    print("set", repo)
    try:
        fetch(HubSet(repo, tuple(patterns)), Path(folder))
    except DiffvlError as error:
        print(f"error {error.exit_code}: {error}")
"""
CHUNK = 10 << 20  # bytes that the client writes at a time
GOOD, DAMAGED = "org/good", "org/damaged"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """Two sets; the connection breaks once inside a large file, and one file comes with other bytes than the hub tells."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("good", "damaged"):
        (root / name / "data").mkdir(parents=True)
    (root / "good" / "records.json").write_text("[]", encoding="utf-8")
    (root / "good" / "large.zip").write_bytes(b"z" * (CHUNK + 1000))
    (root / "good" / "other.bin").write_bytes(b"not asked for")
    (root / "damaged" / "data" / "sound.bin").write_bytes(b"1234")
    (root / "damaged" / "data" / "wrong.bin").write_bytes(b"5678")
    sets = {GOOD: root / "good", DAMAGED: root / "damaged"}
    return Hub(sets, cut={"large.zip": CHUNK + 10}, stated={"data/wrong.bin": b"5679"})


def test_sets_of_a_hub_are_fetched_once_and_checked(hub: Hub, tmp_path: Path):
    patterns = ["records.json", "*.zip"]
    cases = [
        *([GOOD, patterns, "here"], [GOOD, patterns, "here"], [DAMAGED, ["data/*.bin"], "here"]),
        *([GOOD, ["nothing-*"], "there"], ["org/none", ["*"], "there"]),
    ]
    with hub_of(hub):
        variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
        words = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
        done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = ("\n" + done.stdout).split("\nset ")[1:]
    assert told[0] == f"{GOOD}\nhere/good: 2 files, 0.0105 GB\nhere/good: checking the sums"
    assert told[1] == f"{GOOD}\nhere/good: there and checked"
    assert "error 2: org/damaged: 1 files are not what the hub has:\nhere/damaged/data/wrong.bin: sha256 " in told[2]
    assert told[2].endswith("Remove here/damaged/data/wrong.bin and type the same again")
    assert "error 2: org/good: no file nothing-* there: " in told[3]
    assert "error 2: org/none cannot be fetched (" in told[4] and "Is there a network, and does it reach the hub?" in told[4]
    # The broken file was gone on with where it broke; nothing came twice, and nothing that was not asked for.
    assert sorted(hub.asked) == sorted(
        [("records.json", 0), ("large.zip", 0), ("large.zip", CHUNK), ("data/sound.bin", 0), ("data/wrong.bin", 0)]
    )
    assert (tmp_path / "here" / "good" / "large.zip").stat().st_size == CHUNK + 1000
    assert is_fetched(HubSet(GOOD, ()), tmp_path / "here") and not is_fetched(HubSet(DAMAGED, ()), tmp_path / "here")
    assert not (tmp_path / "there").exists()
    (tmp_path / "here" / "good" / "large.zip").write_bytes(b"cut")
    assert not is_fetched(HubSet(GOOD, ()), tmp_path / "here"), "a file of another size is fetched anew"


def test_without_a_network_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"LLaVA-Pretrain cannot be fetched .*python -m tools\.llava_data"):
        fetch(PRETRAIN, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llava_data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000_000})())
    llava_data._require_room(tmp_path / "a" / "b", 4_000_000_000)
    with pytest.raises(DiskError, match=r"119\.2 GB are to be fetched, and the disk has 5\.0 GB left: nothing was fetched"):
        llava_data._require_room(tmp_path / "a" / "b", 119_200_000_000)


def test_what_a_killed_fetch_left_is_removed_and_what_runs_is_left_alone(tmp_path: Path):
    rests = tmp_path / ".cache" / "huggingface" / "download" / "data"
    rests.mkdir(parents=True)
    for name, age in (("old.incomplete", 7200), ("new.incomplete", 0), ("old.metadata", 7200)):
        (rests / name).write_text("", encoding="utf-8")
        now = (rests / name).stat().st_mtime
        os.utime(rests / name, (now - age, now - age))
    llava_data._remove_rests(tmp_path)
    assert sorted(path.name for path in rests.iterdir()) == ["new.incomplete", "old.metadata"]


def read(settings: dict[str, str]) -> list[Record]:
    records = list(parse_source(find_source(DataSource.model_validate(settings))))
    assert all(isinstance(record, Record) for record in records)
    return records  # type: ignore[return-value]


def test_what_is_drawn_has_the_published_form_and_a_file_is_held_out(tmp_path: Path):
    llava_data.draw(tmp_path, align=3, train=4, held_out=2)
    assert sorted(path.name for path in (tmp_path / PRETRAIN.name).iterdir()) == list(PRETRAIN.patterns)
    assert all(INSTRUCT.uses(f"data/{path.name}") for path in (tmp_path / INSTRUCT.name / "data").iterdir())
    assert [len(record.images) for record in read(pretraining(tmp_path))] == [1, 1, 1]
    settings, held_out = instructions(tmp_path)
    assert held_out is not None and held_out.name == "train-00001-of-00002.parquet"
    assert [len(one) for one in (read(settings), read({"path": str(held_out)}))] == [4, 2]


@pytest.mark.parametrize(("files", "read_ones"), [(2, ["00000"]), (12, [f"{number:05d}" for number in range(11)]), (1, None)])
def test_the_last_file_is_held_out(files: int, read_ones: list[str] | None, tmp_path: Path):
    """Of a single file nothing is; neither of a set that has not been fetched, whose number of files nobody knows."""
    folder = tmp_path / INSTRUCT.name / "data"
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"train-{number:05d}-of-{files:05d}.parquet").write_bytes(b"")
    settings, held_out = instructions(tmp_path)
    if read_ones is None:
        assert (settings, held_out) == ({"path": str(folder / "train-*.parquet")}, None)
        return
    assert held_out == folder / f"train-{files - 1:05d}-of-{files:05d}.parquet"
    assert [file.split("-")[-3] for file in find_source(DataSource.model_validate(settings)).files] == read_ones
