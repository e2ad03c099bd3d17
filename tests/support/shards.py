"""WebDataset tars of small records."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from helpers import random_image


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(number: int) -> bytes:
    """A small image; different numbers give different ones."""
    buffer = io.BytesIO()
    random_image(number).save(buffer, format="PNG")
    return buffer.getvalue()


def value_of(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"It is {number}. " * (1 + number % 3)}]
    return {"id": f"r{number}", "conversations": turns}


def write_tars(folder: Path, shards: int, records: int) -> Path:
    """Writes tars of so many records each, numbered through; gives the pattern of their names."""
    folder.mkdir(exist_ok=True, parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for number in range(shard * records, (shard + 1) * records):
                add(archive, f"{number:06}.json", json.dumps(value_of(number)).encode())
                add(archive, f"{number:06}.png", png(number))
    return folder / "*.tar"
