"""`AdapterBank`: many adapters for one base model, one for each item of a mixed batch.

Reading order: this file; `batch` (applied to the model and removed), `tensor` (read by layers as
their weight) and `products` (computed with it); `layout` and `probe` (the items' dimension in each
tensor); `store` (files).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from lora_lightning.bank.batch import Batch, check_free
from lora_lightning.bank.calls import items_of
from lora_lightning.bank.classes import ATTRIBUTE
from lora_lightning.bank.mix import Part, Room, lasting
from lora_lightning.bank.probe import explain
from lora_lightning.bank.probing_runs import Looks
from lora_lightning.bank.store import Source, Store
from lora_lightning.errors import AdapterError, ConfigError
from lora_lightning.model import eval_caches, lending
from lora_lightning.model.calling import Call, Forward, call_of
from lora_lightning.model.switching import disabled
from lora_lightning.model.view import View


class AdapterBank:
    r"""Adapter files for one model, one of them for each item of a batch.

    .. code-block:: python

        bank = AdapterBank(model.eval(), "speakers/")
        with bank[["alice", "bob", None, "alice"]]:
            y = model(batch)  # the third item is the source model's

    Item i is computed with :math:`W + s_i B_i A_i` in each layer that its adapter adapts, and with
    the heads, norms and statistics that it owns: what `set_active` and a batch of one give.
    Outside the block the model is what it was; nothing is injected or renamed. Ranks, scalings,
    targets and kinds of factors (DoRA, LoRA-XS, moved starts) may differ between adapters. For
    inference: the model must be in eval mode; gradients reach inputs, not the bank. (The products
    per item follow Wen & Chaudhuri 2023, "Batched low-rank adaptation of foundation models",
    arXiv:2312.05677.)

    The items' dimension in the input of each layer is inferred from a few runs of the first mixed
    batch (or of `example`), see `lora_lightning.bank.probe`, and kept: other batch sizes, lengths
    and image sizes are fine; a batch of another kind is probed as well. Layers that cannot compute
    per item run once for every adapter (see `places`), or an error names their tensors.

    Args:
        model: The base of all adapters. One block of one bank, in one thread, can serve it at a
            time. Its weights must stay as they are.
        source: A folder of ``.safetensors`` files, each named after its file; or a mapping from
            name to path; or paths. A file is read when it is first needed.
        capacity: How many adapters are kept in memory; those used last stay.
        capacity_bytes: How many bytes they may take. ``None``: no limit.
        example: A batch of two items or more to probe at once; how the model is called with
            it, see `lora_lightning.model.calling`. ``None``: the first mixed batch is probed.
        forward: From (model, batch): runs the model once on `example`.
        dim: Dimension of the model's inputs that holds the items. An input whose size is another
            there has them in the first dimension that fits, or is shared by all items.
        check: ``"weights"`` or ``"structure"``, as in `lora_lightning.load_adapter`.

    Raises:
        ConfigError: a bad value or name.
        AdapterFileError: a file or the folder does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        *,
        capacity: int = 256,
        capacity_bytes: int | None = None,
        example: Any = None,
        forward: Forward | None = None,
        dim: int = 0,
        check: str = "weights",
    ):
        self.model, self.dim = model, dim
        self._store = Store(model, capacity, capacity_bytes, check)
        self._looks, self._room = Looks(dim), Room()
        self._store.add(source)
        if example is not None:
            self.probe(example, forward=forward)

    def add(self, source: Source, *, overwrite: bool = False) -> list[str]:
        """Add more files, named as in the constructor; returns their names.

        Raises:
            AdapterExistsError: a name is taken and `overwrite` is off.
        """
        return self._store.add(source, overwrite)

    def read(self, *names: str) -> dict[str, dict[str, Any]]:
        """Read adapters into memory before they are needed.

        Returns:
            What the header of each one's file says of items and classes, such as ``class_names``.
        """
        with lasting(self.model):
            self._store.take(names)
        return {name: self._store.data[name] for name in names}

    def remove(self, *names: str) -> None:
        """Forget these adapters; their files stay. One that is unknown: `AdapterNotFoundError`."""
        self._store.remove(names)

    def __getitem__(
        self, names: str | Sequence[str | None] | None
    ) -> AbstractContextManager[nn.Module]:
        """A ``with`` block in which item i of the batch has the adapter ``names[i]``.

        ``None`` stands for the source model. One name instead of a list is that of every item.

        Raises:
            AdapterNotFoundError: the bank has no adapter of that name.
            ConfigError: something that is no name.

        Within the block, calling the model raises `AdapterError` where the batch has another number
        of items, where items interact, or where an adapter's tensor cannot be had per item.
        """
        alone = names is None or isinstance(names, str)
        if not alone and not isinstance(names, Iterable):
            raise ConfigError(f"give an adapter's name, or one for each item, not {names!r}")
        listed: tuple[Any, ...] = (names,) if alone else tuple(names)  # type: ignore[arg-type]
        if not listed:
            raise ConfigError("no names: give one for each item of the batch")
        self._store.check(n for n in listed if n is not None)
        return self._applied(listed, None if alone else len(listed))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def probe(
        self,
        batch: Any,
        names: str | Sequence[str] | None = None,
        *,
        forward: Forward | None = None,
    ) -> dict[str, str]:
        """Infer the items' dimension in each tensor from this batch, and return `places`.

        Args:
            batch: As `example`.
            names: Whose tensors to probe; default: the adapters in memory, else the first.
            forward: As in the constructor.

        Raises:
            AdapterError: the batch has less than two items, or the model fails to run.
        """
        check_free(self.model)  # before `forward` runs it
        call = call_of(self.model, batch, forward)
        given = (names,) if isinstance(names, str) else names
        chosen = list(given or self._store.representatives())
        n = items_of(call, self.dim)
        if n < 2:
            raise AdapterError(f"two items or more are needed to tell them apart, got {n}")
        with ExitStack() as stack:
            prepared = self._prepared((*chosen, None), stack)
            self._looks.arrange(prepared, call, n, again=True)
        return self.places

    @property
    def places(self) -> dict[str, str]:
        """Tensor's path → where its items lie, as far as it has been probed, as text."""
        return self._looks.describe()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._store.files)

    @property
    def held(self) -> list[str]:
        """Names of the adapters in memory, the most recently used last."""
        return list(self._store.held)

    @property
    def nbytes(self) -> int:
        """Memory of these adapters, in bytes."""
        return self._store.nbytes

    def __contains__(self, name: object) -> bool:
        return name in self._store.files

    def __len__(self) -> int:
        return len(self._store.files)

    def __repr__(self) -> str:
        counts = f"{len(self)} adapters, {len(self.held)} in memory"
        return f"{type(self).__name__}({type(self.model).__name__}, {counts})"

    @contextmanager
    def _applied(self, names: tuple[str | None, ...], expected: int | None) -> Iterator[nn.Module]:
        with ExitStack() as stack:
            batch = self._prepared(names, stack)

            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                batch.announce((args, kwargs))
                batch.announced = True

            batch.before = lambda call: self._before(batch, call, expected)
            handle = self.model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            yield self.model

    def _prepared(self, names: tuple[str | None, ...], stack: ExitStack) -> Batch:
        """The batch, applied to the model until `stack` closes."""
        return stack.enter_context(lending.applied(partial(self._put_on, names)))

    def _put_on(self, names: tuple[str | None, ...], stack: ExitStack) -> Batch:
        view = View(self.model)
        lending.check_thread(view, "bank[...]")
        view.check_whole("an AdapterBank")
        if check_free(self.model):
            stack.enter_context(disabled(self.model))
        with lasting(self.model):
            taken = self._store.take(list(dict.fromkeys(n for n in names if n is not None)))
            adapters: dict[str | None, dict[str, Part]] = {None: {}}
            adapters.update(taken)
            batch = Batch(self.model, names, adapters, self._looks.last, self._room)
        modules = view.modules
        shortcuts = eval_caches.cachers(modules), eval_caches.packers(modules)
        stack.callback(eval_caches.settle, *shortcuts)
        stack.enter_context(lending.lent([m for _, m in modules], "bank[...]"))
        stack.enter_context(batch.applied())
        eval_caches.settle(*shortcuts, lambda m: ATTRIBUTE in m.__dict__)
        return batch

    def _before(self, batch: Batch, call: Call, expected: int | None) -> None:
        """Before a call of the model: check its number of items; probe an unknown kind of call."""
        if expected is None or batch.probing:
            return
        found = items_of(call, self.dim)
        if found != expected:
            raise AdapterError(
                f"{expected} names for a batch of {found} items (dimension {self.dim} of the first "
                "input): give one name for each item, None for the source model"
            )
        if batch.n == 1:
            return
        self._looks.arrange(batch, call, found)
        problems = {p: why for p, why in batch.places.problems.items() if p in batch.paths}
        if problems:
            raise explain(problems)
