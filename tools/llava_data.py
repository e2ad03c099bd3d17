"""The data of DiffusionVL's two stages: fetched from the hub and checked, or drawn in the same form.

usage: python -m tools.llava_data FOLDER

FOLDER/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json, images.zip     records of one turn, and their images
FOLDER/LLaVA-NeXT-Data/data/train-*.parquet                       conversations, with the images in them

A connection that breaks is taken up again within the file; another start goes on with the first file that is not whole. A set is
there when its `fetched.json` is: every file has then had the size and the sum that the hub tells, and no network is needed.
"""

import argparse
import json
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of the library under it

from diffvl.cli.output import print_line
from diffvl.demo.shapes import write_shapes
from diffvl.errors import DataError, DiffvlError, DiskError, first_few, first_line
from diffvl.store.files import Writing, replace_text
from diffvl.terminal.console import shell_line

KIND = "a set that cannot be fetched"
FETCHED = "fetched.json"
GB = 1e9
REST_AGE = 3600  # seconds


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub. patterns: of the files that are used."""

    repo: str
    patterns: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]

    def uses(self, path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in self.patterns)


RECORDS, IMAGES = "blip_laion_cc_sbu_558k.json", "images.zip"
PRETRAIN = HubSet("liuhaotian/LLaVA-Pretrain", (RECORDS, IMAGES))
INSTRUCT = HubSet("lmms-lab/LLaVA-NeXT-Data", ("data/train-*.parquet",))


# --- fetching --------------------------------------------------------------------------------------------------------------


def is_fetched(hub_set: HubSet, folder: Path) -> bool:
    """Tells whether a set is there and whole: every file that was checked still has its size."""
    root = folder / hub_set.name
    if not (root / FETCHED).is_file():
        return False
    sizes: dict[str, int] = json.loads((root / FETCHED).read_text(encoding="utf-8"))["files"]
    return all((root / name).is_file() and (root / name).stat().st_size == size for name, size in sizes.items())


def fetch(hub_set: HubSet, folder: Path) -> None:
    """Fetches what is not there yet, and checks every file.

    Raises:
        DataError: the hub cannot be reached, has no such set, or a file has another sum.
        DiskError: there is no room for it. In every case what has been fetched is kept for the next try.
    """
    root = folder / hub_set.name
    if is_fetched(hub_set, folder):
        print_line(f"{root}: there and checked")
        return
    try:
        with Writing(root):
            _fetch(hub_set, root)
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, DiffvlError):
            raise
        again = shell_line("python", "-m", "tools.llava_data", folder)
        raise DataError(
            f"{hub_set.repo} cannot be fetched ({first_line(error)}). Is there a network, and does it reach the hub? What has "
            "come is kept: the same command goes on from there. On a machine with a network, to copy the folder from: " + again,
            KIND,
        ) from error


def _fetch(hub_set: HubSet, root: Path) -> None:
    """Fetches one state of the set, whatever is changed on the hub meanwhile."""
    patterns = list(hub_set.patterns)
    _remove_rests(root)
    files = snapshot_download(hub_set.repo, repo_type="dataset", local_dir=root, allow_patterns=patterns, dry_run=True)
    for pattern in hub_set.patterns:
        if not any(fnmatch(file.filename, pattern) for file in files):
            raise DataError(f"{hub_set.repo}: no file {pattern} there: it is no longer as it was published", KIND)
    _require_room(root, sum(file.file_size or 0 for file in files if file.will_download))
    print_line(f"{root}: {len(files)} files, {sum(file.file_size or 0 for file in files) / GB:.3g} GB")
    asked: dict[str, Any] = {"repo_type": "dataset", "revision": files[0].commit_hash, "local_dir": root}
    snapshot_download(hub_set.repo, allow_patterns=patterns, **asked)
    print_line(f"{root}: checking the sums")
    checked = HfApi().verify_repo_checksums(hub_set.repo, **asked)
    _refuse_damage(hub_set, root, checked)
    sizes = {file.filename: (root / file.filename).stat().st_size for file in files}
    replace_text(
        root / FETCHED, json.dumps({"repo": hub_set.repo, "revision": asked["revision"], "files": sizes}, indent=1) + "\n"
    )


def _remove_rests(root: Path) -> None:
    """Removes what a killed fetch had of a file, which no later one goes on with; a fetch that runs touches its files."""
    for rest in root.glob(".cache/huggingface/download/**/*.incomplete"):
        if time.time() - rest.stat().st_mtime > REST_AGE:
            rest.unlink()


def _require_room(root: Path, needed: int) -> None:
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DiskError(
            f"{root}: {needed / GB:.1f} GB are to be fetched, and the disk has {free / GB:.1f} GB left: nothing was fetched. "
            "Make room, or name another place: make recipe-llava DATA=FOLDER"
        )


def _refuse_damage(hub_set: HubSet, root: Path, checked: Any) -> None:
    """Raises DataError for files whose sums are others than the hub's, and for those that are not there."""
    wrong = [one for one in checked.mismatches if hub_set.uses(one["path"])]
    missing = [path for path in checked.missing_paths if hub_set.uses(path)]
    if not wrong and not missing:
        return
    told = [f"{root / one['path']}: {one['algorithm']} {one['actual']}, expected {one['expected']}" for one in wrong]
    told += [f"{root / path}: not there" for path in missing]
    remove = f"Remove {shell_line('rm', *(root / one['path'] for one in wrong))[3:]} and type the same again" if wrong else ""
    raise DataError(
        "\n".join(
            [f"{hub_set.repo}: {len(told)} files are not what the hub has:", *first_few(told, 5), remove or "Type it again"]
        ),
        KIND,
    )


# --- what is read ------------------------------------------------------------------------------------------------------------


def pretraining(folder: Path) -> dict[str, str]:
    """Gives the setting `data.train` of the align stage."""
    root = folder / PRETRAIN.name
    return {"path": str(root / RECORDS), "image_folder": str(root / IMAGES)}


def instructions(folder: Path) -> tuple[dict[str, str], Path | None]:
    """Gives the setting `data.train` of the diffuse stage, and the file that is held out of it: the last one.

    Where nothing has been fetched it is all files, and none is held out, since nobody knows how many there are.
    """
    root = folder / INSTRUCT.name / "data"
    files = sorted(root.glob("train-*.parquet"))
    if len(files) < 2:
        return {"path": str(root / "train-*.parquet")}, None
    first, last = (file.name.split("-")[1] for file in (files[0], files[-2]))
    return {"path": str(root / files[0].name.replace(f"-{first}-", f"-{{{first}..{last}}}-"))}, files[-1]


# --- stand-ins ----------------------------------------------------------------------------------------------------------------


def draw(folder: Path, align: int = 8, train: int = 8, held_out: int = 4) -> None:
    """Writes both sets with the built-in images in the place of theirs; what is there is left alone."""
    drawn = folder / "drawn"
    files = write_shapes(drawn, align=align, train=train, test=held_out)
    first = folder / PRETRAIN.name
    first.mkdir(parents=True, exist_ok=True)
    records = json.loads(files["align"].read_text(encoding="utf-8"))
    with zipfile.ZipFile(first / IMAGES, "w") as archive:
        for record in records:
            archive.write(drawn / record["image"], record["image"])
    replace_text(first / RECORDS, json.dumps(records))
    for number, split in enumerate(("train", "test")):
        _write_parquet(files[split], folder / INSTRUCT.name / "data" / f"train-{number:05d}-of-00002.parquet")


def _write_parquet(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    form = {"id": text, "conversations": [{"from": text, "value": text}], "data_source": text, "image": datasets.Image()}
    rows = [
        {
            "id": str(number),
            "conversations": record["conversations"],
            "data_source": "drawn",
            "image": {"bytes": (file.parent / record["image"]).read_bytes(), "path": Path(record["image"]).name},
        }
        for number, record in enumerate(json.loads(file.read_text(encoding="utf-8")))
    ]
    datasets.Dataset.from_list(rows, features=datasets.Features(form)).to_parquet(to)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch and check the data of DiffusionVL's two stages.")
    parser.add_argument("folder", type=Path, help="folder to fetch into")
    folder = parser.parse_args().folder
    try:
        for hub_set in (PRETRAIN, INSTRUCT):
            fetch(hub_set, folder)
    except DiffvlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
