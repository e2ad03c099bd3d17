r"""Where images stand in a text: the marker `<image>`, how to write it as mere text, and what others write in its place.

A backslash before the marker takes its meaning away: `\<image>` is the text `<image>`. The same holds for the spellings that
can hardly be anything else (`<image_1>`, `<|image|>`), which are refused otherwise, because a model would read them as text
and its image would stand somewhere else.
"""

import re

IMAGE_MARKER = "<image>"
ESCAPE = "\\"

_NAMES = r"(?:image|img|picture|pic|photo)"
# Nobody writes these but for an image: numbered ones, and the tokens of other models.
_SURE = "|".join(
    (
        rf"<{_NAMES}[ _-]?\#?\d+>",
        rf"<\|{_NAMES}[ _-]?\#?\d*\|>",
        r"<\|?(?:image|img|vision|media|video|audio)_(?:pad|start|end|begin|content)\|?>",
        r"<(?:image|img)_(?:placeholder|soft_token|context|here|token)>",
        r"<(?:start|end|begin)_of_(?:image|img)>",
        r"<(?:imageplaceholder|imagehere|im_patch|im_image|image_patch)>",
    )
)
# In a record with images these mean one; elsewhere they may be HTML, Markdown or prose.
_LIKELY = "|".join(
    (
        rf"(?!(?-i:{IMAGE_MARKER}))<{_NAMES}s?\s*/?>",
        rf"(?<!!)\[{_NAMES}(?:[ _-]?\#?\d+)?\](?!\(|:|\[)",
        rf"\{{\{{?{_NAMES}\}}?\}}",
        r"<(?:ImageHere|IMG_CONTEXT)>",
    )
)
_ESCAPED = re.compile(rf"\\(?={IMAGE_MARKER}|{_SURE})", re.IGNORECASE)
_MARKER = re.compile(rf"(?<!\\){IMAGE_MARKER}")
_SURE_PATTERN = re.compile(rf"(?<!\\)(?:{_SURE})", re.IGNORECASE)
_LIKELY_PATTERN = re.compile(rf"(?<!\\)(?:{_SURE}|{_LIKELY})", re.IGNORECASE)
_OTHER_MEDIA = re.compile(r"(?:^|\n)\s*(<(?:video|audio|speech)>)\s*(?:\n|$)", re.IGNORECASE)


def pieces_between(text: str) -> list[str]:
    """Cuts a text at its markers, one piece more than there are markers; the pieces are what a model reads."""
    if "<" not in text and ESCAPE not in text:
        return [text]
    return [_ESCAPED.sub("", piece) for piece in _MARKER.split(text)]


def count_markers(text: str) -> int:
    """Counts the images that the text shows."""
    return len(_MARKER.findall(text)) if IMAGE_MARKER in text else 0


def with_markers(text: str, num_images: int) -> str:
    """Gives a text without markers, with one for each image in front of it, each on a line of its own: LLaVA's habit."""
    return f"{IMAGE_MARKER}\n" * num_images + text


def plain(text: str) -> str:
    """Gives a text without images as a model reads it."""
    return _ESCAPED.sub("", text) if ESCAPE in text else text


def mistaken_marker(text: str, images: bool) -> str | None:
    """Tells what looks like a marker of an image and is none.

    Args:
        images: the record has images, so that a spelling that could be something else most likely means one.
    """
    if not any(bracket in text for bracket in ("<[{" if images else "<")):
        return None  # most texts, which need no search
    found = (_LIKELY_PATTERN if images else _SURE_PATTERN).search(text)
    return found[0] if found else None


def other_media(text: str) -> str | None:
    """Gives the marker of a video or a sound, where it stands on a line of its own."""
    found = _OTHER_MEDIA.search(text) if "<" in text else None
    return found[1] if found else None
