"""What packages of loggers kept in a folder of logs: each run's hyperparameters and metrics' names.

Each function is called as its package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Kept = list[tuple[dict[str, Any], set[str]]]


def tensorboard(logs: Path) -> Kept:
    """As TensorBoard reads its files of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    kept = []
    for version in sorted(logs.iterdir()):
        events = EventAccumulator(str(version)).Reload()
        [begin] = [m for n, m in events.summary_metadata.items() if n.endswith("start_info")]
        found = HParamsPluginData.FromString(begin.plugin_data.content).session_start_info.hparams
        tags = events.Tags()
        hparams = {k: v.number_value or v.string_value for k, v in found.items()}
        kept.append((hparams, {*tags["scalars"], *tags["histograms"]}))
    return kept


def wandb(logs: Path) -> Kept:
    """From the files that ``wandb sync`` sends."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process may still be writing
    kept = []
    for file in sorted(logs.glob("wandb/offline-run-*/*.wandb")):
        records = list(map(Record.FromString, _leveldb_log(file.read_bytes())))
        config = [i for r in records for i in r.config.update]
        hparams = {_name(i): json.loads(i.value_json) for i in config}
        kept.append((hparams, {_name(i) for r in records for i in r.history.item}))
    return kept


def _name(item: Any) -> str:
    """A histogram has an item for each of its parts."""
    return item.key or "/".join(item.nested_key).removesuffix("/bins")


def _leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: pieces in blocks of 32 kB, after a header of 7 bytes each."""
    at, record = 7, b""
    while at + 7 < len(data):
        left = -at % 32768
        if 0 < left < 7:  # too little for a header
            at += left
        end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
        kind, record = data[at + 6], record + data[at + 7 : end]
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
        at = end


def mlflow(logs: Path) -> Kept:
    """As MLflow's client reads its database."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{logs / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}
    return [
        ({k: int(v) if v.isdigit() else v for k, v in run.data.params.items()}, {*run.data.metrics})
        for run in runs
    ]
