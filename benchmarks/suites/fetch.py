"""Packages of npm and Debian, fetched by the user's own clients into the user's cache."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from functools import cache
from pathlib import Path

# npm package → version. Debian's mirrors hold one version of each: the one that is there.
NPM = {
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/emojione": "1.2.3",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emoji-datasource": "16.0.0",
}
FASHION = "dataset-fashion-mnist"
UPRIGHT = (
    "fonts-comfortaa", "fonts-courier-prime", "fonts-dosis", "fonts-freefont-ttf",
    "fonts-inconsolata", "fonts-lato", "fonts-linuxlibertine", "fonts-open-sans", "fonts-play",
    "fonts-quicksand",
)  # fmt: skip
WRITTEN = (
    "fonts-breip", "fonts-dkg-handwriting", "fonts-femkeklaver", "fonts-humor-sans", "fonts-kristi",
)  # fmt: skip


def folder(*names: str) -> Path:
    """A folder of the suites in the cache: `$LORA_LIGHTNING_CACHE`, or ~/.cache/lora-lightning."""
    base = os.environ.get("LORA_LIGHTNING_CACHE") or Path.home() / ".cache" / "lora-lightning"
    found = Path(base, "suites", *names)
    found.mkdir(parents=True, exist_ok=True)
    return found


def npm(name: str) -> tarfile.TarFile:
    """The archive of an npm package, fetched by ``npm pack``; its files are under ``package/``."""
    wanted = f"{name.strip('@').replace('/', '-')}-{NPM[name]}.tgz"
    path = folder("npm") / wanted
    if not path.exists():
        _run("npm", "pack", "--silent", f"{name}@{NPM[name]}", "--pack-destination", path.parent)
    return tarfile.open(path)


def member(name: str, path: str) -> bytes:
    """One file of an npm package."""
    with npm(name) as archive:
        file = archive.extractfile(f"package/{path}")
        assert file is not None
        return file.read()


def debian(name: str) -> Path:
    """The unpacked files of a Debian package, fetched by ``apt-get download``."""
    to = folder("debian") / name
    if not to.exists():
        for old in to.parent.glob(f"{name}_*.deb"):
            old.unlink()
        _run("apt-get", "download", "-qq", name, cwd=to.parent)
        [archive] = to.parent.glob(f"{name}_*.deb")
        _run("dpkg-deb", "-x", archive, to)
        archive.unlink()
    return to


@cache
def licence(name: str) -> str:
    """As the package itself states it."""
    if name in NPM:
        import json

        return str(json.loads(member(name, "package.json"))["license"])
    text = (debian(name) / "usr/share/doc" / name / "copyright").read_text(errors="replace")
    # The first stated one is that of the work; later ones are of the packaging.
    found = re.search(r"^License:\s*(.+)$", text, re.M)
    return found[1].strip() if found else "see its copyright file"


def _run(*command: object, cwd: Path | None = None) -> None:
    words = [str(word) for word in command]
    try:
        subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SystemExit(f"the suites need {words[0]}, which is not installed") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()[-1:]
        raise SystemExit(f"{' '.join(words)} failed: {' '.join(said)}") from error
