"""How a checkpoint reads the data file that it is shown."""

from pathlib import Path

from diffvl.config.recipe import Data
from diffvl.store import checkpoint
from diffvl.store.checkpoint import recipe_of


def reading_of(directory: Path, data: Path) -> Data:
    """Tells how a checkpoint's own recipe reads a data file: `image_folder` and `unpaired_turns` of the stage whose train or eval
    file lies in the same folder; the defaults where there is none."""
    if not (directory / checkpoint.RECIPE_FILE).is_file():
        return Data()
    for stage in recipe_of(directory).stages.values():
        files = [Path(file) for file in (stage.data.train, stage.data.eval) if file is not None]
        if any(file.absolute().parent == data.absolute().parent for file in files):
            return Data(image_folder=stage.data.image_folder, unpaired_turns=stage.data.unpaired_turns)
    return Data()
