"""A data set on a hub: found, fetched once and read by number, or read as a stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from local_hub import hub_with
from shards import png, value_of

NAME = "some-org/some-set"
PROGRAM = """
import json, sys
from diffvl.config.sources import DataSource
from diffvl.data.columns import ColumnNames
from diffvl.data.images import open_image
from diffvl.data.reading import READERS
from diffvl.data.records import RecordReader
from diffvl.data.rows import Part
from diffvl.data.source_records import parse_source
from diffvl.data.sources import find_source
from diffvl.errors import DiffvlError


def show(name, split, how):
    source = find_source(DataSource(path=name, split=split), how == "stream")
    records = parse_source(source)
    if how == "stream":
        reader, columns = RecordReader(source.images(), "error"), ColumnNames(None)
        rows = READERS[source.kind](source.files[0], source.name_of(0), columns, True, Part())
        records = (reader.record_or_problem(row, source.path, 1) for _, row in rows)
    for record in records:
        print(record.source, record.turns[-1].text, open_image(record.images[0], record.source).size)

for case in json.loads(sys.argv[1]):
    print("case")
    try:
        show(*case)
    except DiffvlError as error:
        print(f"error: {error}")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub") / "set"
    (root / "data").mkdir(parents=True)
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    form = {"id": datasets.Value("string"), "image": datasets.Image(), "conversations": [turn]}
    rows = [{**value_of(number), "image": {"bytes": png(number), "path": None}} for number in range(3)]
    whole = datasets.Dataset.from_list(rows, features=datasets.Features(form))
    whole.to_parquet(root / "data" / "train-00000-of-00001.parquet")
    whole.select([2]).to_parquet(root / "data" / "test-00000-of-00001.parquet")
    (root / "README.md").write_text("# A set\n")
    return root


TRAIN = [f"data/train-00000-of-00001.parquet:{place} It is {place - 1}." for place in (1, 2, 3)]
CASES = (
    (NAME, None, "number", TRAIN),
    (NAME, "test", "number", ["data/test-00000-of-00001.parquet:1 It is 2."]),
    (NAME, None, "stream", TRAIN),
    (NAME, "none", "number", [f"error: {NAME}: no split 'none'; set data.split to one of: test, train"]),
    ("some-org/none", None, "number", ["error: some-org/none: no such file here, and "]),
)


@pytest.mark.slow
def test_a_set_on_a_hub(repository: Path, tmp_path: Path) -> None:
    with hub_with(repository, NAME) as address:
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
        }
        words = [sys.executable, "-c", PROGRAM, json.dumps([case[:3] for case in CASES])]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables, timeout=300)
    told = [part.splitlines() for part in done.stdout.split("case\n")[1:]]
    assert len(told) == len(CASES), done
    for lines, (*_, says) in zip(told, CASES, strict=True):
        assert len(lines) == len(says) and all(line.startswith(text) for line, text in zip(lines, says, strict=True)), done
