"""`ResumableLoader`: a DataLoader with a state, for exact resumption in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

Source = tuple[Callable[[], Any], Callable[[Any], Any]]  # getter and setter of a random state


class Position:
    """A loader's place in its epoch, and the random states that determine its order.

    Args:
        *sources: Random states that the loader depends on beside torch's own.
    """

    def __init__(self, *sources: Source):
        self.sources = [(torch.get_rng_state, torch.set_rng_state), (_cuda, _set_cuda), *sources]
        # Those that Lightning makes for the next epoch; each draws a seed for its workers.
        self.iterators, self.epoch_ended = 1, False
        self.most: float = float("inf")  # batches of an epoch, where they are limited
        self.taken = self.batches = 0
        self.made = self.begun = self.random()  # when the iterator was made, and first asked
        self.resumed: dict[str, Any] | None = None

    def random(self) -> list[Any]:
        """The present random states."""
        return [get() for get, _ in self.sources]

    def set_random(self, states: list[Any]) -> None:
        """Set the random states."""
        for (_, put), state in zip(self.sources, states, strict=True):
            put(state)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types and tensors."""
        last = self.taken >= min(self.batches, self.most) and not self.epoch_ended
        finished = self.epoch_ended or last
        states = {"made": self.made, "begun": self.begun, "now": self.random()}
        return {"finished": finished, "last": last, "taken": self.taken, **states}

    @property
    def at_last_batch(self) -> bool:
        """Whether it resumes after an epoch's last batch, but before the epoch's end."""
        return bool(self.resumed and self.resumed.get("last"))

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """Within the block random numbers go on from the checkpoint's."""
        assert self.resumed is not None
        self.set_random(self.resumed["now"])
        yield  # such as the guard's look at the target, which draws seeds of loaders
        self.resumed["now"] = self.random()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint: the next iterator resumes there."""
        self.resumed = state


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that resumes in mid-epoch, or with the next epoch's order.

    Args:
        position: Its place in the epoch; loaders that replace each other share one.
        **settings: Of the DataLoader.
    """

    at_once = True  # an iterator draws a seed when it is made, as a DataLoader's own

    def __init__(self, *, position: Position | None = None, **settings: Any):
        super().__init__(**settings)
        self.position = position or Position()

    def __iter__(self) -> Any:
        if self.position.resumed is None:
            self.position.made = self.position.random()
        return self._follow(super().__iter__())

    def _follow(self, batches: Iterator[Any]) -> Iterator[Any]:
        place = self.position
        state, place.resumed = place.resumed, None
        if state is None:
            place.taken, place.begun = 0, place.random()
        else:
            batches = self._resume(state)
        place.batches = len(self)
        for batch in batches:
            place.taken += 1
            yield batch

    def _resume(self, state: dict[str, Any]) -> Iterator[Any]:
        place = self.position
        place.set_random(state["now"])
        if state["finished"]:
            for _ in range(place.iterators if self.at_once else 1):
                place.made, batches = place.random(), super().__iter__()
            place.taken, place.begun = 0, place.random()
            return batches
        place.made, place.begun, place.taken = state["made"], state["begun"], state["taken"]
        place.set_random(place.made)
        batches = super().__iter__()
        place.set_random(place.begun)
        list(islice(batches, place.taken))
        place.set_random(state["now"])
        return batches

    def state_dict(self) -> dict[str, Any]:
        """For Lightning, in mid-epoch; `SelfTraining` saves it at an epoch's end as well."""
        return self.position.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Likewise; what `SelfTraining` has loaded stays: a look at a round's end changes it."""
        if self.position.resumed is None:
            self.position.load_state_dict(state_dict)


def begin_next_epoch(trainer: Trainer) -> None:
    """Let a fit by ``max_steps`` that was stopped at an epoch's end go on with the next epoch.

    Lightning 2.6 takes it for one in mid-epoch (see `FitLoop.restarting`), and trains on one more
    batch of the epoch that is over.
    """
    loop: Any = trainer.fit_loop
    if trainer.max_steps != -1 and getattr(loop, "restarted_on_epoch_end", False):
        for each in (loop, loop.epoch_loop):
            each._restarting = False
            each.reset_restart_stage()
        loop.epoch_progress.increment_completed()


def _cuda() -> Any:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state() if used else None


def _set_cuda(state: Any) -> None:
    if state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
