"""Commands on a page of docs/, run as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from lora_lightning import cli

DOCS = Path(__file__).parents[2] / "docs"


def run_commands(
    page: str, part: int, change: Callable[[list[str]], list[str]] = lambda words: words
) -> None:
    """Run the sh blocks of a part of a page, each word by word as `change` has it."""
    text = (DOCS / page).read_text(encoding="utf-8").split("\n## ")[part]
    for block in re.findall(r"^`{3}sh\n(.*?)^`{3}$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lora-lightning"]:
                assert cli.main(change(words[1:])) == 0, line
