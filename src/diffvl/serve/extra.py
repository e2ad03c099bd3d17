"""What `diffvl serve` needs besides the package itself: the extra `diffvl[serve]`. Nothing of it is imported here."""

import importlib.util

from diffvl.errors import UsageError

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}  # starlette comes with fastapi


def require_extra() -> None:
    """Raises UsageError unless all of it is installed."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        raise UsageError(
            f"diffvl serve needs packages that are not installed here: pip install 'diffvl[serve]', or {names} alone"
        )
