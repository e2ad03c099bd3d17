"""Which of many paths are files, asked of their folders: one listing instead of a question per file, which a network disk answers
a thousand times a second and no more."""

import os
from contextlib import suppress

_ALONE = 8  # files of a folder that are asked for one by one before it is listed: it may hold millions that nobody asks for


class ExistingFiles:
    """`path in files`: whether it is a file (or a link to one), as of when its folder was looked at."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}  # paths that were asked for one by one
        self._asked: dict[str, int] = {}
        self._listed: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        listed = self._listed.get(folder)
        if listed is not None and name in listed:
            return True
        if path not in self._known:
            # Also what a listing does not have: the disk may know it under another spelling.
            self._known[path] = os.path.isfile(path)
            self._asked[folder] = self._asked.get(folder, 0) + 1
            if self._asked[folder] == _ALONE:
                self._listed[folder] = _files_in(folder)
        return self._known[path]


def _files_in(folder: str) -> set[str]:
    with suppress(OSError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}
    return set()
