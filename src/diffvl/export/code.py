"""The Python files that stand beside exported weights: those of `diffvl.hub`, and of `remote` for the layouts of others.

Invariant: what is exported is the code in this package, line for line; only its imports of itself are relative, since beside
weights all files lie in one folder.
"""

import re
from pathlib import Path

from diffvl.export import remote
from diffvl.store.checkpoint import HUB, HUB_FILES
from diffvl.store.files import Writing, replace_text

REMOTE = Path(str(remote.__file__)).parent
OWN_IMPORT = re.compile(r"^from diffvl\.(?:hub|export\.remote)\.(\w+) import ", re.MULTILINE)


def write_code(directory: Path, names: tuple[str, ...]) -> None:
    """Writes remote files by name, and all of the hub's, which they use. Raises DiskError."""
    with Writing(directory):
        for name in HUB_FILES:
            (directory / name).write_bytes((HUB / name).read_bytes())
        for name in names:
            replace_text(directory / name, relative((REMOTE / name).read_text(encoding="utf-8")))


def relative(text: str) -> str:
    """Gives a file's text with relative imports of its neighbours."""
    return OWN_IMPORT.sub(r"from .\1 import ", text)
