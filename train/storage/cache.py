"""The folder of built datasets and downloaded files."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder for built datasets and downloads. It may not exist yet.

    It is $TRITIUM_HOME, or `tritium` in the platform's cache folder.
    """
    if home := os.environ.get("TRITIUM_HOME"):
        return Path(home)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tritium"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tritium"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritium"
