"""`counted_warnings`: warnings are counted, and listed once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_lightning.report.console import PlainConsole


@contextmanager
def counted_warnings(console: PlainConsole) -> Iterator[None]:
    """Within the block warnings are counted, and each is printed once, at its end."""
    found: Counter[str] = Counter()

    def count(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        found[f"{category.__name__}: {' '.join(str(message).split())}"] += 1

    with warnings.catch_warnings():
        # Where no other filter says what to do; else a place would warn only once.
        warnings.simplefilter("always", append=True)
        warnings.showwarning = count
        try:
            yield
        finally:
            if number := sum(found.values()):
                console.print(f"{number} warning{'s' * (number > 1)}:", style="yellow")
            for text, times in found.most_common():
                console.print(f"  {times} × {text}")
