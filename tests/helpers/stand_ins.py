"""Stand-ins for packages of loggers that are not installed: each gives the list of its calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

Calls = list[tuple[str, Any]]


def _modules(monkeypatch, **members):
    """Modules by dotted name, with "__" for the dot."""
    for name, held in members.items():
        module = ModuleType(name.replace("__", "."))
        module.__path__ = []
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def tensorboard(monkeypatch) -> Calls:
    """`tensorboardX`, which Lightning takes where TensorBoard itself is absent."""
    calls: Calls = []

    class SummaryWriter:
        def __init__(self, log_dir, **_):
            calls.append(("log_dir", log_dir))
            Path(log_dir).mkdir(parents=True)

        def add_histogram(self, *arguments):
            calls.append(("add_histogram", arguments))

        def add_scalar(self, *arguments):
            calls.append(("add_scalar", arguments))

        def _get_file_writer(self):
            return SimpleNamespace(add_summary=lambda *_: None)

        def flush(self):
            pass

        close = flush

    def hparams(params, metrics):
        calls.append(("hparams", params))
        return (None,) * 3

    _modules(
        monkeypatch,
        tensorboardX={"SummaryWriter": SummaryWriter},
        tensorboardX__summary={"hparams": hparams},
    )
    home = "lightning.fabric.loggers.tensorboard"
    monkeypatch.setattr(f"{home}._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(f"{home}._TENSORBOARDX_AVAILABLE", True)
    return calls


def wandb(monkeypatch) -> Calls:
    """W&B: one run at a time, until it is finished."""
    calls: Calls = []

    class Run:
        id = "1"

        def __init__(self, **options):
            calls.append(("init", options))
            self.config = SimpleNamespace(update=lambda p, **_: calls.append(("config", p)))
            self.log = lambda metrics: calls.append(("log", metrics))
            self.define_metric = lambda *_, **__: None
            sys.modules["wandb"].run = self

        def finish(self, exit_code):
            calls.append(("finish", exit_code))
            sys.modules["wandb"].run = None

    class Histogram:
        def __init__(self, values):
            self.values = values

    _modules(
        monkeypatch,
        wandb={"run": None, "init": Run, "Histogram": Histogram},
        wandb__sdk={},
        wandb__sdk__lib={"RunDisabled": type("RunDisabled", (), {})},
        wandb__wandb_run={"Run": Run},
    )
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return calls


def mlflow(monkeypatch) -> Calls:
    """MLflow's client."""
    calls: Calls = []

    class MlflowClient:
        def __init__(self, uri):
            calls.append(("uri", uri))

        def get_experiment_by_name(self, name):
            return SimpleNamespace(lifecycle_stage="active", experiment_id=name)

        def create_run(self, experiment_id, tags):
            calls.append(("create_run", experiment_id))
            return SimpleNamespace(info=SimpleNamespace(run_id=len(calls)))

        def log_batch(self, run_id, params=(), metrics=()):
            calls.append(("log_batch", {e["key"]: e["value"] for e in (*params, *metrics)}))

        def get_run(self, run_id):
            return run_id

        def set_terminated(self, run_id, status):
            calls.append(("set_terminated", status))

    _modules(
        monkeypatch,
        mlflow={"set_tracking_uri": lambda _: None},
        mlflow__tracking={"MlflowClient": MlflowClient, "context": SimpleNamespace()},
        mlflow__entities={"Param": dict, "Metric": dict},
    )
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    return calls
