"""How much a server takes on. Nothing heavy is imported, so that the command line can show the defaults."""

from dataclasses import dataclass

MOST_MESSAGES = 256  # of a conversation: a chat template is asked about each of its turns
MOST_PARTS = 256  # of a message
SIGNS_PER_PART = 4  # commas and brackets that a part of a message takes in JSON
MOST_STOPS = 16
LETTERS_PER_TOKEN = 16  # a text with more letters for each token that a prompt may have is refused before it is tokenised
BODY_SECONDS = 30.0  # in which a request must have arrived
FETCH_SECONDS = 20.0  # in which an image of the net must have arrived
ALL_FETCH_SECONDS = 60.0  # in which those of a request must, one after the other


@dataclass(frozen=True)
class Limits:
    """samples: decoded together at most. waiting: further requests that wait for a place.
    images, pixels: of a request, all of its images together. prompt_tokens: images included. answer_tokens: that a request may
    ask for. body_bytes: of a request, and of the images that are fetched for it, together.
    seconds: for a request, from its arrival to the end of its answer. fetches_images: whether images may be addresses on the net.
    """

    samples: int = 32
    waiting: int = 128
    images: int = 8
    pixels: int = 50_000_000
    prompt_tokens: int = 8192
    answer_tokens: int = 2048
    body_bytes: int = 20_000_000
    seconds: float = 600.0
    fetches_images: bool = False

    @property
    def letters(self) -> int:
        """Letters of all texts of a request together."""
        return self.prompt_tokens * LETTERS_PER_TOKEN
