"""Adapters on a hub, by `huggingface_hub`: ``push_adapter`` and ``load_adapter("hf://user/name")``.

A repository holds ``adapter.safetensors`` and a page, ``README.md``, that says what it is for and
how it is loaded; one of PEFT's is read as well. ``HF_ENDPOINT`` names another hub than the usual.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.errors import AdapterFileError, MissingDependencyError, first_line
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.adapter_file.peft_format import CONFIG, WEIGHTS
from lora_lightning.model.adapter_file.save import save_adapter

FILE = "adapter.safetensors"
_ADDRESS = re.compile(r"hf:/{1,2}([^@]+)(?:@(.+))?")  # one stroke: as `Path` writes it


def push_adapter(
    model: nn.Module,
    repository: str,
    name: str | None = None,
    *,
    results: Mapping[str, Any] | None = None,
    base: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Put the adapter `name` (default: the active one) on a hub, with a page that describes it.

    Args:
        model: With the adapter.
        repository: ``"user/name"``; made where it does not exist.
        name: Of the adapter.
        results: What was measured → value, for a table on the page.
        base: Address of the base on the hub; default: that of timm's weights, where they are.
        private: Whether a new repository is.
        token: Of the hub; default: that of ``hf auth login``, or ``HF_TOKEN``.

    Returns:
        The commit's address.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        AdapterError: it holds NaN or infinity.
        AdapterFileError: the hub refuses, or does not answer.
        MissingDependencyError: `huggingface_hub` is not installed.
    """
    api = _client().HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    with tempfile.TemporaryDirectory() as folder:
        header, _ = read(save_adapter(model, Path(folder, FILE), name))
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        page = card(header, repository, results or {}, base or cfg.get("hf_hub_id"))
        Path(folder, "README.md").write_text(page, encoding="utf-8")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Add an adapter"
            )
        except Exception as error:  # whatever the network and the hub make of it
            raise _refused(repository, "pushed", error) from error
    return str(done)


def fetched(path: str | os.PathLike[str]) -> Path:
    """The local file or folder of a path; ``hf://user/name@revision`` is fetched first.

    Raises:
        AdapterFileError: the hub refuses, or does not answer, and nothing is kept from before.
        MissingDependencyError: `huggingface_hub` is not installed.
    """
    found = _ADDRESS.fullmatch(os.fspath(path))
    if found is None:
        return Path(path)
    client = _client()
    try:
        folder = client.snapshot_download(
            found[1],
            revision=found[2],
            endpoint=os.environ.get("HF_ENDPOINT"),
            allow_patterns=[FILE, CONFIG, WEIGHTS],
        )
    except Exception as error:  # whatever the network and the hub make of it
        raise _refused(os.fspath(path), "fetched", error) from error
    own = Path(folder, FILE)
    if not own.is_file() and not Path(folder, CONFIG).is_file():
        raise AdapterFileError(f"{path} holds no adapter: neither {FILE} nor PEFT's {CONFIG}")
    return own if own.is_file() else Path(folder)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            "a hub needs huggingface_hub: pip install 'lora-lightning[hub]'"
        ) from error
    return huggingface_hub


def _refused(what: str, done: str, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{what} could not be {done}: {first_line(error)}")


def card(
    header: Mapping[str, Any], repository: str, results: Mapping[str, Any], base: str | None
) -> str:
    """The page of an adapter."""
    data, config, targets = header.get("data", {}), header["config"], header["targets"]
    task = "automatic-speech-recognition" if "labels" in data else None
    task = "image-classification" if "input_size" in data else task
    about = {"library_name": "lora-lightning", "tags": ["lora", "lora-lightning"]}
    about |= {"base_model": base} if base else {}
    about |= {"pipeline_tag": task} if task else {}
    ranks = sorted({t["rank"] for t in targets})
    facts = {
        "base": f"{header['base']['architecture']} ({base or 'your own weights'})",
        "task": task or "–",
        "classes": ", ".join(data.get("class_names", [])) or "–",
        "input": _input(data),
        "rank": f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ranks[0] if ranks else "–",
        "alpha": config.get("alpha", "–"),
        "adapted tensors": len(targets),
        "trained in full": ", ".join(header["extras"]) or "–",
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items())
    parts = [f"---\n{front}\n---\n\n# {_plain(repository)}", _table("", facts)]
    parts += ["## Results", _table("measured", results)] if results else []
    parts += ["## How to load", _LOADING.format(repository=repository)]
    return "\n\n".join(parts)


_LOADING = """\
```python
from lora_lightning import load_adapter

load_adapter(model, "hf://{repository}")  # `model`: the base, with the weights named above
```
"""


def _input(data: Mapping[str, Any]) -> str:
    if "sample_rate" in data:
        return f"{data['sample_rate']} Hz, {len(data['labels']['symbols'])} symbols"
    told = [f"{key} {data[key]}" for key in ("mean", "std", "interpolation") if key in data]
    return ", ".join([f"{data['input_size'][1:]} pixels", *told]) if "input_size" in data else "–"


def _table(head: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows.items()]
    return "\n".join([f"| {head} | |", "| --- | --- |", *lines])


def _plain(value: Any) -> str:
    """A value in a cell: nothing in it is markup."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|!])", r"\\\1", text)
