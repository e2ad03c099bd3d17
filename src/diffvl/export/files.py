"""The small files of SDAR's layouts: tokenizer, generation settings, configuration.

Invariant: the tokenizer's files are those of the run and more: engines and older releases of transformers read `vocab.json`,
`merges.txt` and `added_tokens.json`, others `tokenizer.json`.
"""

import copy
import json
from pathlib import Path
from typing import Any

from diffvl.export.source import Run
from diffvl.store.files import Writing, read_json, replace_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes an object as config files are written. Raises DiskError."""
    replace_text(file, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_tokenizer(run: Run, directory: Path, template: str) -> None:
    """Writes the run's tokenizer with a chat template. Raises DiskError."""
    tokenizer: Any = copy.deepcopy(run.processor.tokenizer)
    tokenizer.chat_template = template
    with Writing(directory):
        tokenizer.save_pretrained(directory)
        tokenizer.backend_tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    added = dict(sorted(tokenizer.get_added_vocab().items(), key=lambda one: one[1]))
    write_json(directory / "added_tokens.json", added)
    named = {name: str(token) for name in SPECIAL if (token := getattr(tokenizer, name, None)) is not None}
    write_json(directory / "special_tokens_map.json", named)


def write_generation_config(run: Run, directory: Path) -> None:
    """Writes the stop, pad and mask tokens and the block size, as the run has them. Raises DiskError."""
    write_json(directory / "generation_config.json", read_json(run.directory / "generation_config.json"))
