"""Stands for `architectures.judge_type` in a child process: models that do their worst to it. The child imports it by name."""

import os
import time

from diffvl.doctor.verdict import Verdict


def judged(name: str) -> Verdict:
    if name == "crashes":
        os.abort()
    if name == "hangs":
        time.sleep(600)
    return Verdict(name, name, "supported", reason=f"{os.getpid()}")
