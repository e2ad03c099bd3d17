"""Wrong tables, zips, tars and streams through the command's own entry point: one message with file and row, exit code 2, nothing
lost."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import write_tars
from tiny_runs import Workshop, command, cut, record, refused, succeed, write_data

pytestmark = pytest.mark.usefixtures("offline")


def words_of(convert: Workshop, **settings: object) -> tuple[object, ...]:
    """Aligns on these settings."""
    changes = [word for key, value in settings.items() for word in ("--set", f"stages.align.{key.replace('__', '.')}={value}")]
    return ("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, "--stage", "align", *changes)


def parquet(file: Path, **changes: Any) -> Path:
    made = {**record(), "image": {"bytes": b"x", "path": "a.png"}, **changes}
    pq.write_table(pa.Table.from_pylist([{**made, "conversations": record()["conversations"]}, made]), file)
    return file


def test_bad_tables(convert: Workshop, tmp_path: Path) -> None:
    file = parquet(tmp_path / "data.parquet", conversations=record(answer="")["conversations"])
    columns = "stages.diffuse.data.columns={messages: turns, image: image}"
    says = [f"{file}: no column `turns`, which data.columns names as messages; its columns are ", "`conversations`", "`image`"]
    convert.refuses("--set", f"stages.diffuse.data.train={file}", "--set", columns, says=says)
    convert.refuses("--set", f"stages.diffuse.data.train={file}", says=[f"{file}:2: turn 2: empty answer", "(record 2"])
    odd = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"question": ["What?"], "image": [b"x"]}), odd)
    convert.refuses("--data", odd, says=[f"{odd}: no column `conversations` or `messages`; its columns are `question`, `image`"])
    pq.write_table(pa.table({"conversations": ["[]"], "jpg": [b"xx"]}), odd)
    convert.refuses(
        "--data", odd, says=[f"{odd}: column `jpg` holds bytes", "data.columns={conversations: COLUMN, image: COLUMN}"]
    )
    parquet(file)
    says = [f"data.parquet:1: image image of row 1 in {file} cannot be read"]
    convert.refuses("--data", file, says=says)
    cut(file)
    convert.refuses("--data", file, says=[f"{file}: is no Parquet file, or a damaged one"])
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    convert.refuses("--data", file, says=[f"{file}: is a pointer to a file that Git LFS keeps"])


def test_bad_zips(convert: Workshop, tmp_path: Path) -> None:
    file, archive = write_data(tmp_path, record(image="a.png")), tmp_path / "images.zip"
    words = (
        "--data",
        file,
        "--set",
        f"stages.align.data.image_folder={archive}",
        "--set",
        f"stages.diffuse.data.image_folder={archive}",
    )
    for name in ("../a.png", "/etc/a.png", "in/../../a.png", "C:\\a.png", "..\\a.png"):
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("a.png", b"x")
            opened.writestr(zipfile.ZipInfo(name), b"x")
        convert.refuses(*words, says=[f"{archive}: the path of its member", "leaves the folder that it would be unpacked in"])
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(tmp_path / "good.png", "b.png")
    convert.refuses(*words, says=[f"{file}:2: image not found: a.png in {archive} (relative paths start at data.image_folder"])
    outside = write_data(tmp_path, record(image="../a.png"), name="outside.json")
    convert.refuses("--data", outside, *words[2:], says=[f"{outside}:2: image ../a.png is outside of {archive}"])
    archive.write_bytes(b"PK\x03\x04 no zip")
    convert.refuses(*words, says=[f"{archive}: is no zip file, or a damaged one"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": "{packed}"}, "{packed}: a packed tar is read from front to back only: unpack it (gunzip), or, for data to"),
        ({"eval": "{packed}"}, "{packed}: a packed tar is read from front to back only: unpack it (gunzip), or, for data to"),
        ({"train": "{tars}", "streaming": "true", "holdout": 2}, "holdout needs all records of the set"),
        ({"train": "https://example.org/a.parquet"}, "is no file of this machine: fetch it and give its path, or, for data"),
        ({"train": "{tars}", "streaming": "true", "split": "train"}, "data.split has no effect on {tars}"),
        ({"train": "[{path: a.json, wait: 3}]"}, "stages.diffuse.data.train.0.wait: unknown key"),
        ({"train": "{folder}", "split": "test"}, "{folder}: no split 'test'; set data.split to one of: train"),
        ({"train": "no/such-set"}, "no/such-set: no such file here, and"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str, convert: Workshop, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet")
    names = {"{tars}": tmp_path / "*.tar", "{folder}": tmp_path / "set", "{packed}": tmp_path / "a.tar.gz"}
    write_tars(tmp_path, 1, 1)
    names["{packed}"].write_bytes(gzip.compress((tmp_path / "000.tar").read_bytes()))

    def fill(text: Any) -> str:
        for name, path in names.items():
            text = str(text).replace(name, str(path))
        return text

    changes = [word for key, value in settings.items() for word in ("--set", f"stages.diffuse.data.{key}={fill(value)}")]
    convert.refuses(*changes, says=[fill(says)])


def test_a_stream_that_breaks_off_and_what_it_goes_on_with(convert: Workshop, tmp_path: Path) -> None:
    """A tar cut short stops the run at the step that comes to it; the last checkpoint stays. Other files, or another number of
    loader processes, would give other records: refused. With the whole tar back, the run goes on."""
    pattern = write_tars(tmp_path / "tars", 2, 6)
    spare = tmp_path / "tars" / "001.tar.spare"
    shutil.copy(tmp_path / "tars" / "001.tar", spare)
    content = spare.read_bytes()
    # Of the same size, as a fetch that was broken off can leave it; only its end is missing.
    (tmp_path / "tars" / "001.tar").write_bytes(content[: len(content) // 2] + b"\1" * (len(content) - len(content) // 2))
    words = words_of(
        convert, data__train=pattern, data__streaming="true", data__window=2, data__workers=0, steps=6, batch_size=2, save_every=1
    )
    says = [f"{tmp_path}/tars/001.tar:", "the tar is damaged or cut short after its sample "]
    refused(*words, says=says)
    work = convert.out / "align.partial"
    kept = sorted(path.name for path in (work / "checkpoints").iterdir())
    assert kept
    refused(
        *words,
        "--resume",
        "--set",
        "stages.align.data.workers=3",
        says=["began with 1 process of 1 loader process", "data.workers=1"],
    )
    (tmp_path / "tars" / "002.tar").write_bytes(content)
    refused(
        *words, "--resume", says=["the data is not what the run began with", "(2 files), now", "(3 files); file 3 is the first"]
    )
    (tmp_path / "tars" / "002.tar").unlink()
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == kept
    shutil.copy(spare, tmp_path / "tars" / "001.tar")
    succeed(*words, "--resume")
    lines = (convert.out / "align" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    facts = json.loads((convert.out / "align" / "diffvl.json").read_text(encoding="utf-8"))["data"]["train"]
    assert facts["files"] == 2


def test_a_run_on_parquet_is_shown_with_its_images(convert: Workshop, tmp_path: Path) -> None:
    """Held-out records, samples and report work with images that are no files."""
    image = (write_data(tmp_path, record()).parent / "good.png").read_bytes()
    made = [{**record(answer=f"{number}."), "image": {"bytes": image, "path": None}} for number in range(6)]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "data.parquet", row_group_size=2)
    words = words_of(convert, data__train=tmp_path / "data.parquet", data__holdout=2, eval_every=2)
    ended = succeed(*words)
    report = (convert.out / "align" / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/jpeg;base64") == 2 and "image not shown" not in report
    assert "parquet://" not in ended.out
    held = command("evaluate", convert.out / "align", "--data", tmp_path / "data.parquet", "--limit", "2", "--json")
    assert held.code == 0, held.err
