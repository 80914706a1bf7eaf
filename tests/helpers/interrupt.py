"""Interrupting a call at any line of the package, as Ctrl-C or a full memory would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import lora_lightning
from lora_lightning import adapters
from lora_lightning.model.state import states_in
from lora_lightning.model.view import View

_PACKAGE = str(Path(lora_lightning.__file__).parent)
_UNDO = "undo.py"  # the clean-up itself is not interrupted


def lines_of(call: Callable[[], Any], stop: int | None = None, error: Any = None) -> int:
    """How many lines of the package `call` runs; at line `stop` it raises `error`."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) or name.endswith(_UNDO):
            return None
        if event == "line":
            seen += 1
            if seen == stop:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen


def everything(model: nn.Module) -> list[Any]:
    """All that a model is: classes, tables, objects, flags, values, adapters and their state."""
    found: list[Any] = [list(model.state_dict()), adapters(model)]
    for name, module in model.named_modules():
        found.append((name, type(module), id(module), list(module.__dict__), module.training))
        found += [(id(t), t.requires_grad) for t in module._parameters.values() if t is not None]
        found.append(len(module._load_state_dict_pre_hooks))
    for _, state in states_in(View(model)):
        fields = vars(state)
        found += [(id(state), state.active, list(state.configs), list(state.reports))]
        found += [sorted(state.parked), sorted(state.source), repr(state.kinds), len(fields)]
    values = {**model.state_dict(), **dict(model.named_buffers())}
    return found + [(k, t.dtype, t.shape, hash(_bytes(t))) for k, t in values.items()]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two of `everything` are equal, NaN included."""
    return repr(a) == repr(b)


ERRORS = (KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"))
