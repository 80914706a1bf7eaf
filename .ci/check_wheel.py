"""Does the wheel hold all that the checkout holds? Usage: check_wheel.py WHEEL."""

from __future__ import annotations

import subprocess
import sys
import zipfile


def tracked(folder: str) -> set[str]:
    """Paths that git knows under `folder`, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def main(wheel: str) -> None:
    """Compare names; exit 1 where something is missing."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = tracked("lora_lightning")
    wanted |= {p.replace("recipes/", "lora_lightning/_recipes/", 1) for p in tracked("recipes")}
    missing = sorted(wanted - held)
    if missing:
        sys.exit(f"{wheel} lacks {', '.join(missing)}")
    if "lora_lightning/py.typed" not in held:
        sys.exit(f"{wheel} lacks py.typed")
    if not any(name.endswith("/LICENSE") for name in held):
        sys.exit(f"{wheel} lacks the licence")
    print(f"{len(held)} files, nothing missing")


if __name__ == "__main__":
    main(sys.argv[1])
