"""Random numbers: drawn aside, and whether any were drawn."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lora_lightning.training.prefix_cache.inputs import Inputs


@contextmanager
def aside(inputs: Inputs, seed: int | None) -> Iterator[None]:
    """Random numbers drawn within the block leave the generators as they are."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=_devices(inputs)):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def generators(inputs: Inputs) -> Hashable:
    """Where the generators of torch, Python and NumPy stand: whoever draws moves one of them."""
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _devices(inputs))]
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    torchs = tuple(bytes(state.numpy()) for state in states)
    return torchs, random.getstate(), numpy["pos"], bytes(numpy["key"])


def _devices(inputs: Inputs) -> list[torch.device]:
    found = {x.device for x in inputs.leaves if isinstance(x, Tensor) and x.is_cuda}
    return sorted(found, key=str)
