"""Versions of libraries and hardware, for reports, files and the command."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Name → version of this package, of Python, and of those named."""
    found = {"lora-lightning": installed(), "python": platform.python_version()}
    return found | {name: installed(name) for name in packages}


def installed(name: str = "lora-lightning") -> str:
    """The version of an installed package; "unknown" where it is none."""
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def hardware() -> str:
    """The machine, as one line of text."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} CPU cores{gpu}"
