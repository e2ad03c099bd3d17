"""`data.train`, `data.eval` -> `Source`s: which files a set has, of which kind, and how they are read. Nothing of their contents
is looked at here, but for the list of a data set's own parts.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets import load_dataset_builder, load_from_disk
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfFileSystem, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from diffvl.config.recipe import Data
from diffvl.config.sources import DataSource
from diffvl.data.image_folder import ImageFolder
from diffvl.data.jsonfile import KIND, check_path, unknown_suffix
from diffvl.data.opening import is_remote, suffix_of
from diffvl.data.reading import ARROW, JSON, KIND_OF_SUFFIX, PARQUET, TAR
from diffvl.errors import ConfigError, DataError, first_few, first_line

_MODULES = {"parquet": PARQUET, "arrow": ARROW, "webdataset": TAR, "json": JSON}  # of `datasets`
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PATTERN = re.compile(r"[*?\[]")
_DEFAULT_SPLIT = "train"
_MOST_FILES = 1_000_000


@dataclass(frozen=True)
class Source:
    """One data set. path: what messages name, a file or the folder (or id) that has its files. kind: which reader reads them.
    files: paths or URLs, in their order. names: what these are called below `path`, None for a single file."""

    path: Path
    kind: str
    files: tuple[str, ...]
    settings: DataSource
    names: tuple[str, ...] | None = None

    def name_of(self, number: int) -> str:
        """Gives what a record's source calls the file."""
        return self.path.name if self.names is None else self.names[number]

    def within(self, number: int) -> str | None:
        """Gives the file as problems name it below `path`."""
        return None if self.names is None else self.names[number]

    def images(self) -> ImageFolder:
        """Finds the images that records name by their paths. Raises DataError as `ImageFolder`."""
        first = self.files[0]
        beside = None if is_remote(first) else os.path.dirname(os.path.abspath(first))
        if self.names is not None and self.path.is_dir():
            beside = os.path.abspath(self.path)
        return ImageFolder(self.settings.image_folder, beside)


def train_settings(data: Data) -> list[DataSource]:
    """Gives the sources of `data.train`, each with all its settings; at least one.

    Raises:
        ConfigError: there is none, or one stands there twice.
    """
    sources = own_settings(data)
    if not sources:
        raise ConfigError(
            "no training data: give --data FILE (LLaVA-format .json or .jsonl, Parquet, a folder, a hub id) or set data.train in "
            "the recipe"
        )
    places = [(source.path, source.split, source.subset) for source in sources]
    if twice := [place for number, place in enumerate(places) if place in places[:number]]:
        raise ConfigError(f"data.train names {twice[0][0]} twice: give it one entry, with a larger weight")
    return sources


def own_settings(data: Data) -> list[DataSource]:
    """Gives the sources of `data.train`, each with all its settings; none where nothing is set."""
    if data.train is None:
        return []
    if isinstance(data.train, str):
        sources = [DataSource(path=data.train, split=data.split, subset=data.subset)]
    else:
        sources = [data.train] if isinstance(data.train, DataSource) else data.train
    return [_with_defaults(source, data) for source in sources]


def eval_settings(data: Data) -> DataSource | None:
    """Gives the source of `data.eval` with all its settings, if there is one."""
    if data.eval is None:
        return None
    return _with_defaults(DataSource(path=data.eval) if isinstance(data.eval, str) else data.eval, data)


def _with_defaults(source: DataSource, data: Data) -> DataSource:
    given = {name: getattr(data, name) for name in ("columns", "image_folder") if getattr(source, name) is None}
    return source.model_copy(update=given)


def find_source(settings: DataSource, streaming: bool = False) -> Source:
    """Finds the files of a source.

    Args:
        streaming: it is read from front to back.
    Raises:
        DataError: there is no such set, it has no part of that name, or it is of a kind that cannot be read so.
    """
    source = _found(settings, streaming)
    if not streaming and any(is_remote(file) for file in source.files):
        raise DataError(
            f"{source.path}: is no file of this machine: fetch it and give its path, or, for data to train on, set "
            "data.streaming=true",
            KIND,
        )
    return source


def require_distinct(sources: Sequence[Source]) -> None:
    """Raises ConfigError if a file would be read for two entries of `data.train`."""
    seen: set[str] = set()
    for source in sources:
        files = {file if is_remote(file) else os.path.realpath(file) for file in source.files}
        if twice := sorted(files & seen):
            raise ConfigError(f"data.train: {twice[0]} stands in two entries: give it one, with a larger weight")
        seen |= files


def _found(settings: DataSource, streaming: bool) -> Source:
    name = settings.path
    if os.path.isdir(name):
        return _of_folder(settings)
    if not is_remote(name) and not _RANGE.search(name) and not (_PATTERN.search(name) and not os.path.exists(name)):
        if not os.path.exists(name) and _HUB_ID.fullmatch(name) and suffix_of(name) not in KIND_OF_SUFFIX:
            return _of_hub(settings, streaming)
        _refuse_parts(settings)
        return _of_file(settings)
    _refuse_parts(settings)
    files = sorted({file for pattern in _ranges(name) for file in _matches(pattern)})
    if not files:
        raise DataError(f"{name}: no such files", KIND)
    return _of_files(settings, files, None)


def _refuse_parts(settings: DataSource) -> None:
    for key in ("split", "subset"):
        if getattr(settings, key) is not None:
            raise DataError(
                f"data.{key} has no effect on {settings.path}: only a folder or a hub id has such parts; remove it", KIND
            )


def _of_file(settings: DataSource) -> Source:
    path = Path(settings.path)
    if not path.exists():
        check_path(path)  # it has the words for it
    kind = KIND_OF_SUFFIX.get(suffix_of(settings.path))
    if kind is None:
        raise unknown_suffix(path)
    return Source(path, kind, (settings.path,), settings)


def _of_files(settings: DataSource, files: Sequence[str], root: Path | None) -> Source:
    kinds = {KIND_OF_SUFFIX.get(suffix_of(file)) for file in files}
    if None in kinds or len(kinds) > 1:
        odd = next(file for file in files if KIND_OF_SUFFIX.get(suffix_of(file)) in (None, *list(kinds)[1:]))
        raise DataError(
            f"{settings.path}: {odd} is of another kind than the others, or of none that is read; name one kind", KIND
        )
    if root is None:
        folder = os.path.commonprefix([file.rpartition("/")[0] + "/" for file in files]).rpartition("/")[0]
        root = Path(folder or ".")
        names = tuple(file.removeprefix(f"{folder}/") if folder else file for file in files)
    else:
        names = tuple(os.path.relpath(file, root) for file in files)
    (kind,) = kinds
    assert kind is not None
    return Source(root, kind, tuple(files), settings, names)


def _ranges(pattern: str) -> Iterator[str]:
    """Gives the names that a pattern with {000..123} stands for, as WebDataset writes its shards."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST_FILES:
        raise DataError(f"{pattern}: {found[0]} is no range of up to {_MOST_FILES} numbers that rise", KIND)
    for number in range(first, last + 1):
        yield from _ranges(f"{pattern[: found.start()]}{number:0{len(found[1])}}{pattern[found.end() :]}")


def _matches(pattern: str) -> list[str]:
    """Gives the files of a pattern with *, of a single name itself."""
    if not _PATTERN.search(pattern.partition("://")[2] if is_remote(pattern) else pattern):
        return [pattern] if is_remote(pattern) or os.path.isfile(pattern) else [_missing(pattern)]
    if not is_remote(pattern):
        return [file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)]
    try:
        return [file.full_name for file in fsspec.open_files(pattern, "rb")]
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{pattern}: cannot be listed ({first_line(error)})", KIND) from error


def _missing(name: str) -> str:
    raise DataError(f"{name}: no such data file", KIND)


# --- data sets of several parts ----------------------------------------------------------------------------------------------


def _of_folder(settings: DataSource) -> Source:
    """Finds the files of a folder: as `save_to_disk` leaves it, or of Parquet, Arrow or tar files as on the hub."""
    root = Path(settings.path)
    if (root / "state.json").is_file():
        _refuse_parts(settings)
        return _of_files(settings, _saved_files(root), root.absolute())
    if (root / "dataset_dict.json").is_file():
        if settings.subset is not None:
            raise DataError(f"data.subset has no effect on {root}, which `save_to_disk` has written: remove it", KIND)
        split = _split(settings, _saved_splits(root))
        return _of_files(settings, _saved_files(root / split), root.absolute())
    builder = _builder(settings, os.path.abspath(root))
    kind = _MODULES.get(builder.name) if builder is not None else None
    if builder is None or kind in (None, JSON):
        check_path(root)  # it has the words for a folder
    files = _files_of_split(builder, settings)
    return _of_files(settings, files, root.absolute())


def _saved_splits(root: Path) -> list[str]:
    try:
        return list(json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{root}: a data set that cannot be opened ({first_line(error)})", KIND) from error


def _saved_files(root: Path) -> list[str]:
    try:
        opened: Any = load_from_disk(str(root.absolute()))
        return [file["filename"] for file in opened.cache_files]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{root}: a data set that cannot be opened ({first_line(error)})", KIND) from error


def _of_hub(settings: DataSource, streaming: bool) -> Source:
    """Finds the files of a data set on the hub, and fetches them unless they are streamed."""
    builder = _builder(settings, settings.path)
    if builder is None:
        raise DataError(f"{settings.path}: holds no data files", KIND)
    kind = _MODULES.get(builder.name)
    if kind is None:
        raise DataError(
            f"{settings.path}: is made of files of kind {builder.name}, which is not read; expected Parquet or tars", KIND
        )
    urls = _files_of_split(builder, settings)
    files = HfFileSystem()
    inside: list[Any] = [files.resolve_path(url) for url in urls]  # of a repository, since the set is one
    names = tuple(place.path_in_repo for place in inside)
    if streaming:
        return Source(Path(settings.path), kind, tuple(urls), settings, names)
    try:
        fetched = [
            hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision) for place in inside
        ]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{settings.path}: cannot be fetched ({first_line(error)}); try again, it goes on from there", KIND
        ) from error
    return Source(Path(settings.path), kind, tuple(fetched), settings, names)


def _builder(settings: DataSource, name: str) -> Any:
    """Opens a data set of several parts without its records; None if there are none."""
    try:
        return load_dataset_builder(name, settings.subset)
    except EmptyDatasetError:
        return None
    except DatasetNotFoundError as error:
        raise DataError(f"{name}: no such file here, and no such data set on the hub", KIND) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: no such file here, and a data set of that name cannot be opened ({first_line(error)})", KIND
        ) from error


def _files_of_split(builder: Any, settings: DataSource) -> list[str]:
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    return splits[_split(settings, list(splits))]


def _split(settings: DataSource, splits: Sequence[str]) -> str:
    """Chooses which part of a data set is read. Raises DataError if it has no such part, or several and no default."""
    split = settings.split
    if split is None:
        split = _DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else splits[0] if len(splits) == 1 else None
    if split not in splits:
        asked = "which split is to be read?" if split is None else f"no split {split!r};"
        there = ", ".join(first_few(sorted(splits), 20)) or "none"
        raise DataError(f"{settings.path}: {asked} set data.split to one of: {there}", KIND)
    assert split is not None
    return split
