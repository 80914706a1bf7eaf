"""`ResumableLoader`: a DataLoader with the same batches, a fit interrupted or not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader


class Position:
    """How far a loader is in its epoch, and the states of what its order is drawn from.

    Args:
        *generators: What the loader draws from beside torch's own: torch's or NumPy's Generators.
        iterators: Iterators that Lightning makes for each epoch but the first; two where it makes
            the loader again in each. Each of them draws a seed for its workers.
    """

    def __init__(self, *generators: Any, iterators: int = 1):
        self.generators, self.iterators = generators, iterators
        self.epoch_ended = False
        self._taken = self._batches = 0
        self._made = self._begun = self._random()
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types and tensors."""
        finished = self.epoch_ended or self._taken >= self._batches
        began = {"made": self._made, "begun": self._begun, "now": self._random()}
        return {"finished": finished, "taken": self._taken, **began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint: the next iterator goes on from there."""
        self._resumed = state

    def follow(self, loader: ResumableLoader, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an epoch; those that are left of it where the fit was resumed."""
        state, self._resumed = self._resumed, None
        if state is None:
            self._taken, self._begun = 0, self._random()
        else:
            batches = self._resume(loader, state)
        self._batches = len(loader)
        for batch in batches:
            self._taken += 1
            yield batch

    def _resume(self, loader: ResumableLoader, state: dict[str, Any]) -> Iterator[Any]:
        if state["finished"]:
            self._set_random(state["now"])
            for _ in range(self.iterators):
                self._made, batches = self._random(), loader.plain()
            self._taken, self._begun = 0, self._random()
            return batches
        self._made, self._begun, self._taken = state["made"], state["begun"], state["taken"]
        self._set_random(self._made)
        batches = loader.plain()
        self._set_random(self._begun)
        list(islice(batches, self._taken))
        self._set_random(state["now"])
        return batches

    def making(self) -> None:
        """An iterator is about to be made."""
        if self._resumed is None:
            self._made = self._random()

    def _random(self) -> list[Any]:
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        return [[_state(g) for g in self.generators], torch.get_rng_state(), *cuda]

    def _set_random(self, states: list[Any]) -> None:
        own, cpu, *cuda = states
        for generator, state in zip(self.generators, own, strict=True):
            if isinstance(generator, torch.Generator):
                generator.set_state(state.cpu())
            else:
                generator.bit_generator.state = state
        torch.set_rng_state(cpu.cpu())
        if cuda and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(cuda[0].cpu())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that goes on in mid-epoch, and with the next epoch's order, where it stopped.

    Lightning saves and loads it in mid-epoch; `SelfTraining` does at an epoch's end as well.

    Args:
        position: Where it is; shared by loaders of which one takes the other's place.
        **settings: Of the DataLoader.
    """

    def __init__(self, *, position: Position | None = None, **settings: Any):
        super().__init__(**settings)
        self.position = position or Position()

    def __iter__(self) -> Any:
        self.position.making()
        # At once, as a DataLoader's own: it draws a seed for its workers.
        return self.position.follow(self, self.plain())

    def plain(self) -> Iterator[Any]:
        """A DataLoader's own iterator."""
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning, which asks in mid-epoch."""
        return self.position.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Likewise."""
        self.position.load_state_dict(state_dict)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state
