"""What `prepare` starts from, by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where the checkpoint comes from, and the vision tower of a language model; a vision-language model has its own."""

    model: str
    revision: str | None
    vision_tower: str | None = None
    trust_remote_code: bool = False
