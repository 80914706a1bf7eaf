"""`export`: a model with an adapter for those who have not this package, checked by running it.

    export(model, "mine.onnx", "onnx", inputs=torch.randn(2, 3, 224, 224))

Another format is a function by which `FORMATS` is added to.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, MissingDependencyError, VerificationError
from lora_lightning.linalg.torch_settings import ieee
from lora_lightning.lora.precision import is_half
from lora_lightning.model import lending, switching
from lora_lightning.model.adapter_file.data_config import data_config
from lora_lightning.model.adapter_file.peft_save import save_peft
from lora_lightning.model.probing import difference, floats, preserved
from lora_lightning.model.state import states_in
from lora_lightning.model.view import View
from lora_lightning.registry import Registry
from lora_lightning.report.files import atomic_write, scratch_folder

Inputs = tuple[Tensor, ...]
Run = Callable[[Inputs], list[Tensor]]  # an exported model's outputs
Free = Sequence[int]  # dimensions of the inputs
Write = Callable[[nn.Module, Path, Inputs, Free], Run | None]
FORMATS: Registry[Format] = Registry("format")
# Accepted differences, relative to the largest output; of models in half precision.
TOLERANCE, HALF = 1e-5, 5e-2


@dataclass(frozen=True)
class Format:
    """A way to export."""

    # From a model in eval mode, a path, a batch of two items or more, and the dimensions of it that
    # are free: writes it, and returns a function that runs what was written; None where it cannot
    # be run here
    write: Write
    whole: bool = True  # whether it holds the base as well
    merged: bool = True  # whether the base must be merged with the adapter for it
    traced: bool = False  # whether it needs an example of the input


@dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
        path: The file or folder.
        differences: Number of items in a batch → largest difference of an output, relative to the
            largest output; empty where there was no input to compare by.
    """

    path: Path
    differences: dict[int, float]


@lending.one_at_a_time
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    merged: bool = True,
    free: Free = (0,),
) -> Exported:
    """Write a model with its active adapter in a format that others load.

    The model stays as it is. What was written is loaded and run on batches of 1, 2 and 7 items, and
    compared with the model.

    Args:
        model: With an adapter, merged or not; or without any, a merged one that was loaded.
        path: A folder for ``timm`` and ``peft``, a file for the others.
        format: ``"timm"``: for ``timm.create_model("local-dir:…", pretrained=True)``; ``"peft"``:
            the adapter alone, for ``PeftModel.from_pretrained``; ``"onnx"``; ``"torch-export"``:
            for ``torch.export.load``. The last two take batches of any size.
        inputs: What the model is called with for a batch; needed for ``onnx`` and ``torch-export``,
            and to compare by.
        merged: For ``onnx`` and ``torch-export``; False: the graph has the factors in it.
        free: For these, dimensions of the inputs that may have any size: 0 the batch; of waveforms
            1, their length.

    Raises:
        ConfigError: an unknown format, or no inputs; the model cannot be exported so.
        TargetError: PEFT has no such adapter for some layers, which are named.
        VerificationError: what was written gives other outputs than the model.
        MissingDependencyError: a package for this format is not installed.
    """
    found, path = FORMATS[format], Path(path)
    if inputs is None and found.traced:
        raise ConfigError(f"{format} needs `inputs`: what the model is called with for a batch")
    if found.merged and not merged:
        raise ConfigError(f"{format} holds a whole model, merged; its layers have no factors")
    batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    merging = _merged(model) if found.whole and merged else switching.unmerged(model)
    with preserved(model), merging, torch.no_grad(), ieee():
        model.eval()
        try:
            run = found.write(model, path, _items(batch, 2), free)
        except ImportError as error:
            raise MissingDependencyError(
                f"{format} needs {error.name}: pip install 'lora-lightning[export]'"
            ) from error
        differences = _compared(model, run, batch, free) if run and batch else {}
    limit = HALF if any(is_half(p.dtype) for p in model.parameters()) else TOLERANCE
    if not all(found <= limit for found in differences.values()):  # NaN is not, either
        raise VerificationError(
            f"{path} gives other outputs than the model (items: largest difference, relative to "
            f"the largest output: {differences}), and at most {limit:g} is accepted; do not use it"
        )
    return Exported(path, differences)


def _compared(model: nn.Module, run: Run, batch: Inputs, free: Free) -> dict[int, float]:
    found = {}
    for number in (1, 2, 7):
        some = _items(batch, number)
        for dim in (d for d in free if d and number == 7):  # another size there as well
            some = tuple(x.narrow(dim, 0, x.shape[dim] * 3 // 4) for x in some)
        found[number] = difference(run(some), list(floats(model(*some))))
    return found


def _items(batch: Inputs, number: int) -> Inputs:
    """So many items of a batch, again from its beginning where it has fewer."""
    return tuple(x[torch.arange(number, device=x.device) % len(x)] for x in batch)


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Within the block the model is merged; one without adapters is as it is."""
    view = View(model)
    if view.merged or not states_in(view):
        yield
        return
    switching.merge(model)
    try:
        yield
    finally:
        switching.unmerge(model)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A file or folder of this name to write; whole at the end of the block, `path` takes it."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(path) as folder:
        yield folder / path.name
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            atomic_write(path.parent / file.relative_to(folder), file.read_bytes())


# ---- formats ---------------------------------------------------------------------------------


def _timm(model: nn.Module, path: Path, batch: Inputs, free: Free) -> Run:
    import timm
    from timm.models import save_for_hf

    if "architecture" not in (getattr(model, "pretrained_cfg", None) or {}):
        raise ConfigError(f"{type(model).__name__} is none of timm's models; export as onnx")
    with staged(path) as folder:
        named = {"label_names": data_config(model).get("class_names")}
        save_for_hf(model, str(folder), named, safe_serialization=True)
    like = next(model.parameters())
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval().to(like)
    return lambda batch: list(floats(loaded(*batch)))


def _peft(model: nn.Module, path: Path, batch: Inputs, free: Free) -> Run | None:
    save_peft(model, path)
    if not batch or find_spec("peft") is None:
        return None
    from peft import PeftModel

    plain = copy.deepcopy(model)
    switching.remove(plain)
    loaded = PeftModel.from_pretrained(plain, str(path)).eval()
    return lambda batch: list(floats(loaded(*batch)))


def _graph(write: str) -> Write:
    """A function of `lora_lightning.deploy.graphs`, which takes long to import."""

    def written(model: nn.Module, path: Path, batch: Inputs, free: Free) -> Run | None:
        from lora_lightning.deploy import graphs

        with staged(path) as file:
            getattr(graphs, f"write_{write}")(model, file, batch, free)
        run: Run | None = getattr(graphs, f"run_{write}")(path)
        return run

    return written


FORMATS.register("timm")(Format(_timm))
FORMATS.register("peft")(Format(_peft, whole=False, merged=False))
FORMATS.register("onnx")(Format(_graph("onnx"), merged=False, traced=True))
FORMATS.register("torch-export")(Format(_graph("program"), merged=False, traced=True))
