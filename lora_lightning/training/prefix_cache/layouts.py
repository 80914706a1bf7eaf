"""What batches of one shape have in common, beside the features of their items."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.training.prefix_cache.calls import Call
from lora_lightning.training.prefix_cache.items import alike

_MOST = 1000  # shapes; batches of older ones are computed anew


@dataclass
class Layout:
    """Structure of what each call gives, and its values without their items."""

    specs: list[Any]
    outlines: list[list[Any]]

    def __post_init__(self) -> None:
        values = [x for row in self.outlines for x in row if isinstance(x, Tensor)]
        self.nbytes = sum(x.nbytes for x in values if 0 not in x.stride())


class Layouts:
    """Hash of what the items of a batch share → layout.

    Attributes:
        nbytes: Memory of values that belong to no item, as tables of positions.
    """

    def __init__(self, calls: list[Call]):
        self.calls, self.nbytes = calls, 0
        self._known: OrderedDict[bytes, Layout] = OrderedDict()

    def __contains__(self, shared: bytes) -> bool:
        return shared in self._known

    def __getitem__(self, shared: bytes) -> Layout:
        return self._known[shared]

    def note(self, shared: bytes, layout: Layout) -> None:
        """Hold it, or compare it with that of an earlier batch.

        Raises:
            ConfigError: they differ.
        """
        known = self._known.get(shared)
        if known is None:
            self._known[shared] = known = layout
            self.nbytes += layout.nbytes
        self._known.move_to_end(shared)
        for call, now, before in zip(self.calls, layout.outlines, known.outlines, strict=True):
            for leaf, a, b in zip(call.leaves, now, before, strict=True):
                if not alike(leaf, a, b):
                    raise ConfigError(
                        f"PrefixCache: what {call.path} gives differs, in shape or in a value that "
                        "belongs to no item, between batches of one shape, so that it cannot be "
                        "stored by item. Leave PrefixCache out"
                    )

    def trim(self, room: int) -> None:
        """Drop those of longest ago, down to so many bytes; the latest stays, as it is in use."""
        while len(self._known) > 1 and (self.nbytes > room or len(self._known) > _MOST):
            _, layout = self._known.popitem(last=False)
            self.nbytes -= layout.nbytes
