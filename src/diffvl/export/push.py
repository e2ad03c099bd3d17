"""`diffvl push`: an exported directory -> a repository of a model hub. Dry unless it is told otherwise, and never without a
licence.
"""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from rich.console import Console

from diffvl.errors import CheckpointError, UsageError, first_line
from diffvl.export.card import CARD, front_matter
from diffvl.store.files import PARTIAL
from diffvl.terminal.console import say

NEVER = ("run.yaml", "diffvl.json", "metrics.jsonl", "samples.jsonl", "report.html")  # name files and folders of this machine
NO_CONNECTION = hub_errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  (its base class for the client's own errors)


def push(directory: Path, repo: str, console: Console, really: bool = False, private: bool = False) -> list[str]:
    """Uploads a directory, or tells what would be uploaded.

    Args:
        really: False only looks. private: whether a repository that is not there yet is made private.
    Returns:
        the files, by name.
    Raises:
        UsageError, CheckpointError: before anything is sent; CheckpointError also where the hub refuses.
    """
    licence = _require_card(directory)
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except hub_errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a repository, as OWNER/NAME: {first_line(error)}") from error
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in NEVER)
    names = [str(path.relative_to(directory)) for path in files]
    for path, name in zip(files, names, strict=True):
        say(console, f"{path.stat().st_size:>16,}  {name}")
    total = sum(path.stat().st_size for path in files)
    if not really:
        kind = " (private, if it is new)" if private else ""
        say(console, f"dry run: {len(files)} files, {total:,} bytes, licence {licence}, to {repo}{kind}; add --yes to upload")
        return names
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repo, folder_path=directory, ignore_patterns=list(NEVER))
    except (NO_CONNECTION, OSError, ValueError) as error:
        raise CheckpointError(f"{repo}: the hub took nothing, or not all ({first_line(error)}); type the same again") from error
    say(console, f"pushed {len(files)} files to ", (repo, "bold"))
    return names


def _require_card(directory: Path) -> str:
    """Gives the licence that the card names.

    Raises:
        UsageError: if this is no exported directory, or the card has no licence.
    """
    if directory.name.endswith(PARTIAL) or not (directory / "config.json").is_file():
        raise UsageError(f"{directory}: no exported checkpoint; expected a directory that `diffvl export` wrote")
    readme = directory / CARD
    if not readme.is_file():
        raise UsageError(f"{directory}: no {CARD} there; export it again: `diffvl export` writes the card")
    licence = front_matter(readme).get("license")
    if not isinstance(licence, str) or not licence.strip():
        raise UsageError(
            f"{readme}: no license in its front matter, and nothing is uploaded without one. Write the source's there, as in "
            "`license: apache-2.0` in the second line, or export with --license apache-2.0"
        )
    return licence
