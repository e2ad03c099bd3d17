"""What `diffvl serve` needs besides the package itself: the extra `diffvl[serve]`. Nothing of it is imported here."""

import importlib.util

from diffvl.errors import UsageError

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def require_extra() -> None:
    """Raises UsageError unless all of it is installed."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"diffvl serve needs {' and '.join(missing)}, which {verb} not installed: pip install 'diffvl[serve]', or, where diffvl "
            f"is installed, pip install {' '.join(missing)}"
        )
