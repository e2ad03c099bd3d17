"""Where a source's images lie: a folder, or a zip that is read in place; and whether one is there."""

import os
import posixpath
from pathlib import Path

from diffvl.data.images import IMAGE_MISSING, ExistingFiles, missing_image, require_path
from diffvl.data.references import Reference, is_there, parts_of, refer
from diffvl.data.videos import VIDEO_MISSING, Video, missing_video
from diffvl.data.zipfiles import ZipIndex, open_zip
from diffvl.errors import DataError

ZIP = ".zip"


def split_zip(folder: str) -> tuple[str, str] | None:
    """Gives (zip, folder inside) of a path that leads into a zip, None for any other."""
    path = Path(os.path.abspath(folder))
    for candidate in (path, *path.parents):
        if candidate.suffix.lower() == ZIP and candidate.is_file():
            inside = path.relative_to(candidate).as_posix()
            return str(candidate), "" if inside == "." else inside
    return None


class ImageFolder:
    """Finds the images of one source."""

    def __init__(self, setting: str | None, beside: str | None) -> None:
        """
        Args:
            setting: `data.image_folder`. beside: the folder of the data file, which stands for it; None if that is a URL.
        Raises:
            DataError: the setting names neither a folder nor a zip that can be read.
        """
        self._is_set = setting is not None
        folder = setting if setting is not None else beside
        self.folder = None if folder is None else os.path.abspath(folder)
        self._files = ExistingFiles()
        self._zip: ZipIndex | None = None
        if setting is not None and not os.path.isdir(setting):
            inside = split_zip(setting)
            if inside is None:
                raise DataError(f"data.image_folder: {setting} is no folder and no .zip", "image folder")
            self._zip = open_zip(inside[0])
            self._inside = inside[1]

    def find(self, image: str) -> str:
        """Gives the name that an image is opened by. Raises DataError without the record's place, if it is not there."""
        if isinstance(image, Reference):
            return image
        require_path(image)
        if self._zip is not None and not os.path.isabs(image):
            return self._in_zip(self._zip, image)
        if self.folder is None and not os.path.isabs(image):
            message = f"where is image {image}? The records are read from a URL: set data.image_folder for their images"
            raise DataError(message, IMAGE_MISSING)
        path = os.path.join(self.folder or "", image)
        if path not in self._files:
            raise missing_image(path, image, self._is_set)
        return path

    def find_video(self, video: Video) -> Video:
        """Gives the name that a video is opened by, or the names of its frames. Raises DataError as `find`."""
        if isinstance(video, Reference):
            return video
        if not isinstance(video, str):
            return tuple(self.find(frame) for frame in video)
        if self._zip is not None and not os.path.isabs(video):
            return self._in_zip(self._zip, video, "video")
        if self.folder is None and not os.path.isabs(video):
            message = f"where is video {video}? The records are read from a URL: set data.image_folder for their videos"
            raise DataError(message, VIDEO_MISSING)
        path = os.path.join(self.folder or "", video)
        if path not in self._files and not os.path.isdir(path):
            raise missing_video(path, self._is_set)
        return path

    def _in_zip(self, archive: ZipIndex, path: str, what: str = "image") -> Reference:
        missing = IMAGE_MISSING if what == "image" else VIDEO_MISSING
        name = posixpath.normpath(posixpath.join(self._inside, path))
        if name.startswith("../"):
            raise DataError(f"{what} {path} is outside of {archive.file}, in which {what}s are looked for", missing)
        if name not in archive:
            folders = "" if what == "image" else "; of a folder of frames in a zip, list the frames"
            raise DataError(
                f"{what} not found: {name} in {archive.file} (relative paths start at data.image_folder, which may lead into a "
                f"folder of the zip{folders})",
                missing,
            )
        return refer("zip", archive.file, name)


class ExistingImages:
    """`image in images`: whether an image that was there when a table was made still is."""

    def __init__(self) -> None:
        self._files = ExistingFiles()
        self._archives: dict[str, bool] = {}

    def __contains__(self, image: str) -> bool:
        if "://" not in image[:12]:
            return image in self._files
        parts = parts_of(image)
        if parts is None or parts[0] != "zip":
            return True  # it stands in a file of the records themselves, by which the table is known
        archive, member = parts[1], parts[2]
        if archive not in self._archives:
            self._archives[archive] = is_there(image)
        return self._archives[archive] and member in open_zip(archive)
