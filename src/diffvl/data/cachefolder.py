"""The folder in which tables, measured lengths and indices lie: that of `datasets`, so that one variable moves all caches."""

from pathlib import Path

from datasets import config as datasets_config

from diffvl.errors import DataError


def cache_folder() -> Path:
    """Tells where tables and measured lengths lie."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "diffvl"


def cache_error(path: Path, error: OSError) -> DataError:
    """Tells what to say where nothing can be written into the cache folder."""
    advice = "set HF_DATASETS_CACHE to a folder that can be written"
    return DataError(f"{path}: its record cache {cache_folder()} cannot be written ({error}); {advice}")
