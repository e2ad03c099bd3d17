"""How the command line writes the settings of decoding.

Invariant: nothing heavy is imported, so that the command line knows its flags, and what is wrong with them, before it loads
anything. Which settings there are, and what fits together, is known to `DecodeSettings` alone.
"""

from dataclasses import fields
from typing import Any

from diffvl.hub.settings_diffvl import DecodeSettings

SETTINGS = tuple(one.name for one in fields(DecodeSettings) if "about" in one.metadata)  # those that have a flag each
OTHER_NAMES = {"denoising_steps": "steps", "remasking": "strategy", "stop_strings": "stop", "cache_implementation": "compile"}


def flag(name: str, value: Any = None) -> str:
    """A setting as it is typed: its flag, with a value where one is typed."""
    word = "--" + OTHER_NAMES.get(name, name).replace("_", "-")
    if value is None or name == "cache_implementation":
        return word
    return f"{word} {value!r}" if value == "" else f"{word} {value}"
