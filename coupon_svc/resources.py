"""Where `lua/` and `sql/` are: inside the installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def resource_folder(name: str) -> Path:
    """The folder `lua` or `sql`. Raises FileNotFoundError when the installation lacks it."""
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the folder {name}/ is missing from this installation of coupon-svc")
