"""What a machine without a network lacks for the report, and how to bring it. Standard library alone."""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

from tools.gpu_report.parts import ROOT

ALSO = ("diffvl", "pytest")
BEFOREHAND = "torch"  # the machine's own; another build would not know its driver


def tell_needs() -> int:
    """Prints what is missing and the commands that bring it. Returns 0 if nothing is, 1 otherwise."""
    missing = missing_packages()
    if not missing:
        print("everything is installed")
        return 0
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"missing here (Python {python}): {', '.join(missing)}")
    if BEFOREHAND in missing:
        print("torch: install the build for this machine's driver first")
    print("on a machine with a network, in this repository (then carry wheels/ over):")
    fetched = [name for name in missing if name.partition("==")[0] not in ("diffvl", BEFOREHAND)]
    if fetched:
        print(f"  pip download -d wheels --no-deps --only-binary=:all: --python-version {python} \\")
        print("    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \\")
        print(f"    {' '.join(fetched)}")
    if "diffvl" in missing:
        print("  pip wheel -w wheels --no-deps .")
    print("here:")
    print(f"  {sys.executable} -m venv --system-site-packages gpu-venv")
    print("  gpu-venv/bin/pip install --no-index --no-deps wheels/*.whl")
    print("  make gpu-report GPU_PYTHON=gpu-venv/bin/python")
    return 1


def missing_packages() -> list[str]:
    """Names of what is not there or too old, with the versions that this repository is tested with. What these need in turn shows
    in the next call: pip would bring a torch along if it followed it itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE))
    pins = {name.lower(): pin for name, pin in pins.items()}
    found = []
    for requirement in [*project["dependencies"], *ALSO]:
        name, _, least = (part.strip() for part in requirement.partition(">="))
        try:
            there = version(name)
        except PackageNotFoundError:
            there = None
        if there is None or _numbers(there) < _numbers(least):
            pin = pins.get(name.lower().replace("_", "-")) or pins.get(name.lower())
            found.append(f"{name}=={pin}" if pin and name != BEFOREHAND else name)
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]
