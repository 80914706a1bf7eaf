"""Locks of a model's adapters: one thread changes or reads them, and none inside some blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock, get_ident
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from lora_lightning.errors import AdapterError
from lora_lightning.model.view import View

P = ParamSpec("P")
T = TypeVar("T")
# Module → the block that has replaced its values, and its thread; not on the module, which may be
# copied.
_lent: WeakKeyDictionary[nn.Module, tuple[str, int]] = WeakKeyDictionary()
_lock = RLock()  # one for all models, as they may share modules


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """A function that changes or reads the adapters of a model, for one thread at a time."""

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return function(*args, **kwargs)

    return locked


@contextmanager
def applied(change: Callable[[ExitStack], T]) -> Iterator[T]:
    """Within the block a change is applied, which puts what undoes it on the stack.

    Other threads change no adapters while it is applied, nor while it is undone.
    """
    with _lock, ExitStack() as stack:
        value = change(stack)
        undo = stack.pop_all()
    try:
        yield value
    finally:
        with _lock:
            undo.close()


def _renew_lock() -> None:
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):  # the thread that holds it is not in the child
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def lent(modules: Iterable[nn.Module], block: str) -> Iterator[None]:
    """Within this block the modules hold temporary values: see `check_home`."""
    before = {m: _lent.get(m) for m in modules}
    _lent.update(dict.fromkeys(before, (block, get_ident())))
    try:
        yield
    finally:
        for module, outer in before.items():
            if outer is None:
                _lent.pop(module, None)
            else:
                _lent[module] = outer


def _loans(view: View) -> list[tuple[str, int]]:
    return [_lent[m] for _, m in view.modules if m in _lent] if _lent else []


def check_home(view: View, what: str, within: str = "") -> None:
    """Refuse to change or read adapters while a block has replaced their values.

    Raises:
        AdapterError: one of the modules is lent to another block than `within`, or to a block of
            another thread.
    """
    check_thread(view, what)
    for block, _ in _loans(view):
        if block != within:
            raise AdapterError(
                f"{what} inside `with {block}:` would be undone by the end of the block, or "
                "outlive it: leave the block first"
            )


def check_thread(view: View, what: str) -> None:
    """Raise AdapterError while a block of another thread has replaced a module's values."""
    for block, thread in _loans(view):
        if thread != get_ident():
            raise AdapterError(
                f"{what}: another thread has this model within `with {block}:`. Wait until it has "
                "left the block, or give each thread a copy of the model"
            )
