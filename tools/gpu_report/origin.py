"""Where a part's figures come from: the accelerator, the code and the date. Standard library alone."""

import datetime
import re
import subprocess
from dataclasses import dataclass

from tools.gpu_report.parts import ROOT

VERSION_FILE = ROOT / "src/diffvl/config/recipe.py"  # read, not imported: parts import it from here, whatever is installed

CHANGES = " with changes"  # after a commit whose files were changed


@dataclass(frozen=True)
class Origin:
    """accelerator: None where it is hidden (`--quick`). version: of diffvl. commit: None where git cannot say."""

    accelerator: str | None
    version: str
    commit: str | None
    date: str

    @property
    def code(self) -> str:
        """The version, and the commit where it is known."""
        return self.version + (f", commit {self.commit}" if self.commit else "")

    def is_same_code(self, other: "Origin") -> bool:
        """Whether nothing says otherwise. What was changed since a commit may have been changed again."""
        changed = self.commit is not None and self.commit.endswith(CHANGES)
        return (self.version, self.commit) == (other.version, other.commit) and not changed

    @property
    def device(self) -> str:
        """The accelerator, or what stands in for it."""
        return self.accelerator or "CPU"


def find_origin(accelerator: str | None) -> Origin:
    """What a run with this accelerator, of the code that is here, has measured today."""
    version = re.search(r'^VERSION = "([^"]+)"', VERSION_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version is not None, VERSION_FILE
    return Origin(accelerator, version[1], _commit(), datetime.date.today().isoformat())


def _commit() -> str | None:
    if not (ROOT / ".git").exists():  # git would answer for a repository around this folder
        return None
    words = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", f"--dirty={CHANGES}"]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
