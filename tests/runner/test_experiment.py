"""A user's own kind of recipe by an `Experiment`; devices and loggers; the common methods."""

import html
import io
import math
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.cli import main
from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.registry import Registry
from lora_lightning.report.console import PlainConsole
from lora_lightning.runner import methods as common
from lora_lightning.runner.cases import LABELS, Adapted, Case, Unlabelled
from lora_lightning.runner.experiment import Experiment, Method
from lora_lightning.runner.loading import KINDS, Kind, apply_overrides, load_recipe, run_recipe
from lora_lightning.runner.progress import Stages as Stages_
from lora_lightning.runner.progress import Ticks, quiet_lightning
from lora_lightning.runner.runner import own_title
from lora_lightning.runner.settings import EpochTraining, RunConfig, TrainStages
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.vision.classifier import Classifier
from tests.helpers import kept_logs, stand_ins

METHODS: Registry[Method] = Registry("method")
common.add(METHODS, "source_only", "label_free", "lora", "full")
HOME, AWAY = "source", ("near", "far")


@dataclass
class Stages(TrainStages):
    label_free: EpochTraining = field(default_factory=lambda: EpochTraining(epochs=1))


@dataclass
class Settings(RunConfig):
    kind: str = "points"
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    train: Stages = field(default_factory=Stages)


class Points(LightningDataModule):
    def __init__(self, shift: float):
        super().__init__()
        x = torch.randn(16, 4, 1, 1, generator=torch.Generator().manual_seed(0)) + shift
        self.items = TensorDataset(x, (x.flatten(1).sum(1) > 4 * shift).long())

    def train_dataloader(self) -> Any:
        return DataLoader(self.items, 8)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.items, 8)


DATA = {HOME: Points(0), "near": Points(1), "far": Points(2)}


class PointsExperiment(Experiment[Settings]):
    """Two targets, each measured on the source domain too."""

    metric = "accuracy"
    methods = METHODS

    def check(self) -> None:
        if self.config.title == "nothing":
            raise ConfigError("title: say more")

    def load(self) -> None:
        self.run.notes.append("points")

    def source(self) -> nn.Module:
        seed_everything(0, verbose=False)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.train_source(model, DATA[HOME])
        return model

    def cases(self, what: str) -> Iterator[Case]:
        for name in AWAY:
            given, size = ("16 target labels", 16) if what == LABELS else (what, None)
            yield Case(name, name, [name, HOME], "" if what == "nothing" else given, size)

    def task(self, model: Any, stage: Any) -> Classifier:
        return Classifier(model, **stage.arguments())

    def fit_data(self, case: Case, stage: Any) -> Points:
        return DATA[case.train]

    def unlabelled(self, model: Any, case: Case) -> Unlabelled:
        stage = self.config.train.label_free
        task = self.task(model, stage)
        told = self.run.notes
        return Unlabelled(
            task, lambda: told.append(case.name), DATA[case.train], trainer={"max_epochs": 1}
        )

    def measure(self, label: str, case: Case, adapted: Adapted) -> Iterator[tuple[str, str, float]]:
        for domain in case.tested:
            x, y = DATA[domain].items.tensors
            found = adapted.model.eval()(x).argmax(1)
            self.answers.setdefault(label, {})[domain] = found
            yield domain, "accuracy", float((found == y).float().mean())

    def shown(self) -> list[str]:
        return ["LoRA, no labels", "LoRA, 16 target labels"]

    def show(self, before: Any, after: Any) -> None:
        self.run.notes.append(f"shown: {sorted(before)}")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The folder of a recipe of this kind."""
    monkeypatch.setattr(KINDS, "_known", dict(KINDS._known))
    KINDS.register("points")(Kind(Settings, PointsExperiment))
    lines = ["kind: points", "accelerator: cpu", "lora: {rank: 1, target_modules: [all]}"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    return tmp_path


def test_a_kind_of_ones_own_has_the_common_methods(recipe):
    run = run_recipe(recipe, ["methods=[source_only,label_free,lora,lora@2,full]"], recipe / "out")
    names = ["LoRA, no labels", "LoRA, 16 target labels", "LoRA, rank 2, 16 target labels"]
    names = ["source only", *names, "full, 16 target labels"]
    assert list(dict.fromkeys(r.method for r in run.rows)) == names
    # A domain that both adapters were measured on comes last, once.
    assert [r.domain for r in run.rows] == [*AWAY, HOME] * len(names)
    assert {r.items for r in run.rows if "labels" in r.method} == {None, 16}
    assert run.notes == ["points", *AWAY, f"shown: {sorted(DATA)}"]
    made = {p.name.removesuffix(".safetensors") for p in (recipe / "out/adapters").iterdir()}
    assert made == {f"{d}{end}" for d in AWAY for end in ("", "-rank-2", "-no-labels")}
    assert run.spectra
    trained = [(n, case) for n in names[1:] for case in AWAY]
    assert list(run.losses) == [("source model", "", 0), *((*t, 0) for t in trained)]
    assert [step for step, _ in run.losses["source model", "", 0]] == list(range(1, 9))
    assert all(math.isfinite(loss) for curve in run.losses.values() for _, loss in curve)
    page = (recipe / "out/report.html").read_text()
    assert "How did the trainings go?" in page
    assert "How sure is that?" not in page  # this kind counts no items


@pytest.mark.usefixtures("undrawn")
def test_the_command_on_the_page_repeats_the_run(recipe):
    """With every override and the folder, quoted for a shell."""
    given = ["methods=[source_only]", "title=it's $5 | 3", "train.source.epochs=1"]
    out = recipe / "my: out"
    run_recipe(recipe, [*given, "out=elsewhere"], out)
    before = (out / "config.yaml").read_bytes()
    page = (out / "report.html").read_text()
    assert "<h1>it&#x27;s $5 | 3</h1>" in page
    [command] = re.findall('<pre class="command">(.*?)</pre>', page, re.DOTALL)
    (out / "config.yaml").unlink()
    program, *argv = shlex.split(html.unescape(command))
    assert (program, main(argv)) == ("lora-lightning", 0)
    assert (out / "config.yaml").read_bytes() == before


def test_a_kind_checks_its_settings_first(recipe):
    with pytest.raises(ConfigError, match="say more"):
        run_recipe(recipe, ["title=nothing"], recipe / "out")
    assert not (recipe / "out").exists()
    with pytest.raises(ConfigError, match="unknown key 'headline'"):
        run_recipe(recipe, ["headline=3"], recipe / "out")


def test_trainings_log_where_the_run_says(recipe):
    run_recipe(recipe, ["methods=[lora]", "logger=csv"], recipe / "out")
    logged = sorted((recipe / "out/logs").glob("*/metrics.csv"))
    assert len(logged) == 3  # the source model's, and one for each target
    assert "loss" in logged[0].read_text().splitlines()[0]
    header = (recipe / "out/logs/version_1/metrics.csv").read_text().splitlines()[0]
    assert sum(name.startswith("lora/") for name in header.split(",")) <= 5
    assert "lora/targets: 1" in (recipe / "out/logs/version_1/hparams.yaml").read_text()
    with pytest.raises(ConfigError, match="unknown logger 'cvs'; did you mean 'csv'"):
        run_recipe(recipe, ["logger=cvs"], recipe / "out")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(recipe, monkeypatch, name):
    home = "lightning.fabric.loggers.tensorboard._TENSORBOARD"
    homes = [f"{home}_AVAILABLE", f"{home}X_AVAILABLE"] if name == "tensorboard" else []
    for each in homes or [f"lightning.pytorch.loggers.{name}._{name.upper()}_AVAILABLE"]:
        monkeypatch.setattr(each, False)
    with pytest.raises(MissingDependencyError, match=rf'pip install "lora-lightning\[{name}\]"'):
        run_recipe(recipe, ["methods=[lora]", f"logger={name}"], recipe / "out")
    assert not (recipe / "out/source.safetensors").exists()


def train_with(logger, out, **options):
    """Train an adapter of one layer."""
    config = RunConfig(accelerator="cpu", logger=logger, out=str(out))
    callback = LoRACallback(rank=1, target_modules="all", output_dir=out, **options)
    trainer = make_trainer(config, [callback], max_epochs=1)
    task = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 2)))
    with quiet_lightning():
        trainer.fit(task, DATA["near"])


def test_every_training_is_a_run_of_its_own_in_the_runs_folder(tmp_path, monkeypatch):
    wandb, mlflow = stand_ins.wandb(monkeypatch), stand_ins.mlflow(monkeypatch)
    board = stand_ins.tensorboard(monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in 2 * ["wandb", "mlflow", "tensorboard"]:
        train_with(name, tmp_path)
    assert [a["dir"] for what, a in wandb if what == "init"] == 2 * [str(tmp_path / "logs")]
    assert [code for what, code in wandb if what == "finish"] == 2 * [0]
    database = f"sqlite:///{tmp_path / 'logs/mlflow.db'}"
    assert [uri for what, uri in mlflow if what == "uri"] == 2 * [database]
    assert [s for what, s in mlflow if what == "set_terminated"] == 2 * ["FINISHED"]
    versions = [str(tmp_path / f"logs/version_{i}") for i in range(2)]
    assert [a for what, a in board if what == "log_dir"] == versions
    for told in (wandb, mlflow, board):
        assert sum(isinstance(a, dict) and a.get("lora/targets") in (1, "1") for _, a in told) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's and W&B's own packages
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_the_packages_themselves_keep_each_training(tmp_path, monkeypatch, capfd, name):
    """As above, by what their files hold; where they are installed."""
    pytest.importorskip(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        train_with(name, tmp_path, log_spectrum=True)
    kept = getattr(kept_logs, name)(tmp_path / "logs")
    assert [(hparams["lora/rank"], hparams["lora/targets"]) for hparams, _ in kept] == 2 * [(1, 1)]
    spectrum = "lora/1.weight/sigma" + "_0" * (name == "mlflow")  # it has no histograms
    for _, names in kept:
        assert {"train_loss", "lora/delta_norm", spectrum} <= names
    assert capfd.readouterr().err.count("wandb:") <= 1  # the bars are there


@pytest.mark.parametrize(
    ("name", "begins", "way_out"),
    [("wandb", "init", "WANDB_MODE"), ("mlflow", "set_tracking_uri", "TRACKING_URI")],
)
def test_a_logger_that_cannot_log_says_what_to_do(tmp_path, monkeypatch, name, begins, way_out):
    def refuse(*_, **__):
        raise OSError("no key")

    getattr(stand_ins, name)(monkeypatch)
    monkeypatch.setattr(f"{name}.{begins}", refuse)
    with pytest.raises(ConfigError, match=rf"logger={name} cannot log \(no key\); .*{way_out}"):
        train_with(name, tmp_path)


def test_a_training_uses_the_devices_that_measuring_does_not(tmp_path):
    config = RunConfig(accelerator="cpu", devices=2, out=str(tmp_path))
    assert make_trainer(config, max_epochs=1).num_devices == 2
    assert make_trainer(config).num_devices == 1
    with pytest.raises(ConfigError, match="devices=0"):
        make_trainer(RunConfig(accelerator="cpu", devices=0, out=str(tmp_path)), max_epochs=1)


def test_every_recipe_has_devices_and_logger():
    config = load_recipe("speaker")
    assert (config.devices, config.logger) == (1, None)


def test_stages_leave_a_line_each_and_warnings_are_counted():
    said = io.StringIO()
    with Stages_(PlainConsole(file=said, width=40)) as stages:
        tick = stages.stage("bob", "steps")
        for _ in range(3):
            tick.say("round 1: rejected")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(warnings, "filters", warnings.filters[-1:])
                warnings.warn("a poor match", UserWarning, stacklevel=1)
        tick.say("round 2: accepted, " + 40 * "x")
        tick(4, 4)
        stages.stage("  a part", "steps")(1, 1)
        stages.line("next")
    lines = said.getvalue().split("\n")
    assert lines[0].startswith("✓ bob: 4/4 steps, 0.0 s, round 2: acc")
    assert all(len(line) <= 40 for line in lines)
    assert lines[-3:] == ["3 warnings:", "  3 × UserWarning: a poor match", ""]
    assert said.getvalue().count("bob") == 1
    assert "rejected" not in said.getvalue()


@pytest.mark.parametrize(
    ("given", "title"),
    [
        (
            ["data.root=a/photos", "data.source=day", "data.target=[night]"],
            "photos: from day to night",
        ),
        (["data.root=a/photos", "data.source=day"], "photos: from day"),
        ([], ""),
    ],
)
def test_a_title_of_the_users_own_data(given, title):
    config = apply_overrides(load_recipe("lighting"), given)
    assert own_title(config) == title


class Keeps(Callback):
    """Keeps the source model at the first step, as a guard does."""

    keeps_source = True

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


def test_where_the_source_is_kept_there_is_no_adapter(recipe, monkeypatch):
    """No file, also none of an earlier run; no parameters in the row; the bar is at its end."""
    bars = []
    real = PointsExperiment.unlabelled

    def kept(self, model, case):
        bar = Ticks(lambda done, total: bars.append((done, total)))
        return replace(real(self, model, case), callbacks=[Keeps(), bar])

    adapters = recipe / "out/adapters"
    adapters.mkdir(parents=True)
    (adapters / "near-no-labels.safetensors").write_bytes(b"of an earlier run")
    monkeypatch.setattr(PointsExperiment, "unlabelled", kept)
    run = run_recipe(recipe, ["methods=[label_free]"], recipe / "out")
    assert not list(adapters.iterdir())
    assert {(r.trainable_parameters, r.file_bytes) for r in run.rows} == {(0, None)}
    assert bars[-1] == (1, 1)
    assert bars[0] == (1, 2)


def test_a_small_source_gets_more_passes(recipe):
    """16 items in batches of 8: two steps a pass."""
    stages = ["train.source.epochs=2", "train.source.least_steps=9", "logger=csv"]
    run = run_recipe(recipe, ["methods=[source_only]", *stages], recipe / "out")
    [logged] = (recipe / "out/logs").glob("*/metrics.csv")
    assert max(int(row.split(",")[0]) for row in logged.read_text().splitlines()[1:]) == 4
    assert "trained for 5 passes" in run.notes[1]
