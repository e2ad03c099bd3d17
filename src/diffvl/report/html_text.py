"""Text for the page."""

import html

from diffvl.terminal.console import visible


def escape(text: str) -> str:
    """Escapes text for the page: what is no text there, as control characters are, is shown as on a terminal."""
    return html.escape(visible(text))
