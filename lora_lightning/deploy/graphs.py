"""A model as a graph that takes batches of any size: ONNX, and torch's own.

What the model says of its classes and items goes with the graph, as JSON under ``"data"``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, first_line
from lora_lightning.model.adapter_file.data_config import data_config
from lora_lightning.model.probing import floats

_LARGEST = 1.5e9  # bytes of weights within an ONNX file, of which 2 GB are the most


Batch = tuple[Tensor, ...]


def _program(model: nn.Module, batch: Batch, free: Sequence[int]) -> torch.export.ExportedProgram:
    """The graph of a model, for inputs of any size in these dimensions.

    Raises:
        ConfigError: torch cannot make one, or only one for these sizes.
    """
    sizes = {d: torch.export.Dim.DYNAMIC if d else torch.export.Dim("batch") for d in free}
    shapes = tuple(sizes for _ in batch)
    with _explained(model):
        return torch.export.export(model, batch, dynamic_shapes=shapes, strict=False)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a model's own forward makes of symbols
        raise ConfigError(
            f"{type(model).__name__} cannot become a graph for inputs of any size: "
            f"{first_line(error)}"
        ) from error


def write_onnx(model: nn.Module, path: Path, batch: Batch, free: Sequence[int]) -> None:
    """Write an ONNX file."""
    import onnx  # noqa: F401  # that it is missing is said by its name
    import onnxscript  # noqa: F401

    graph = _program(model, batch, free)
    with _explained(model):
        program = torch.onnx.export(graph, dynamo=True, verbose=False)
    assert program is not None
    program.model.metadata_props["data"] = json.dumps(data_config(model))
    size = sum(p.nbytes for p in model.parameters())
    program.save(path, external_data=size > _LARGEST)


def run_onnx(path: Path) -> Callable[[Batch], list[Tensor]]:
    """Load an ONNX file, and run it on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(batch: Batch) -> list[Tensor]:
        given = {name: x.cpu().numpy() for name, x in zip(names, batch, strict=True)}
        found: list[Any] = session.run(None, given)
        outputs = [torch.from_numpy(x).to(batch[0].device) for x in found]
        return [x for x in outputs if x.is_floating_point()]

    return run


def write_program(model: nn.Module, path: Path, batch: Batch, free: Sequence[int]) -> None:
    """Write a file for ``torch.export.load``."""
    files = {"data": json.dumps(data_config(model))}
    with path.open("wb") as file:
        torch.export.save(_program(model, batch, free), file, extra_files=files)


def run_program(path: Path) -> Callable[[Batch], list[Tensor]]:
    """Load torch's graph, and run it."""
    module: Any = torch.export.load(path).module()
    return lambda batch: list(floats(module(*batch)))
