"""Words that a shell would act on or a terminal would, and what bash makes of a line; shared by tests of what is suggested."""

import os
import subprocess

QUESTIONS = [
    "What is it?", "", "$(touch x)", "`touch x`", "it's \"it\"", "a\nb", "stop!", "!!", "$HOME ${HOME} ~", "-n", "--", "*",
    "é 漢字 👩‍👩‍👧", "\\", "\\'", "$'\\x41'", "a;b|c&d>e", "#x", "\ttab", "\x1b[2J\x07", "\x9b\x7f", "\u202eabc", "'\x1b'!\\f0é",
    "a  b ", "=a", "{a,b}", "\r\n",
]  # fmt: skip


def typed(line: str, **environment: str) -> list[bytes]:
    """The arguments that a shell gives to a program for a line."""
    script = f'program() {{ for word in "$@"; do printf \'%s\\0\' "$word"; done; }}\n{line}\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={**os.environ, **environment})
    assert done.stderr == b""
    return done.stdout.split(b"\0")[:-1]
