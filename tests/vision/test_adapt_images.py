"""The commands adapt-images, classify and shift, end to end, on files that the tests make."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lora_lightning import load_adapter, read_header
from lora_lightning.cli import main
from lora_lightning.vision import adapt_images as run
from lora_lightning.vision import image_training as training
from tests.helpers.miniature import photos

VIT = ["--model", "test_vit", "--size", "32", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Plots have tests of their own, and docs/your-pictures.md draws these."""
    monkeypatch.setattr("lora_lightning.report.plots.draw", lambda run: [])


@pytest.fixture(autouse=True)
def untaught(monkeypatch):
    """What this model, which learnt nothing, says of the classes decides nothing."""
    for least in ("COMPLETE_ALONE", "LEAST_ITEMS"):
        monkeypatch.setattr(f"lora_lightning.adaptation.class_centroids.{least}", 0)
    monkeypatch.setattr("lora_lightning.adaptation.guard.Guard._alarms", lambda *_: iter(()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=2, img_size=32)
    path = tmp_path_factory.mktemp("model") / "mine.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """night/ flat, with files that are no pictures; rain/ nested; labelled/<class>/."""
    photos(tmp_path / "sets", ("night",), count=3)
    photos(tmp_path, ("labelled",), count=3)
    night, rain = tmp_path / "night", tmp_path / "rain"
    shutil.copytree(tmp_path / "sets/night", rain)
    night.mkdir()
    for i, file in enumerate(sorted(rain.rglob("*.png"))):
        Image.open(file).save(night / f"{i}.{'tif' if i else 'png'}")
    (night / "notes.txt").write_text("Tuesday")
    (night / "torn.jpg").write_bytes(b"torn")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path


def adapt(model, pictures, out, *more, images=("night",)):
    folders = [str(pictures / name) for name in images]
    return main(
        ["adapt-images", *VIT, "--checkpoint", str(model), "--images", *folders, "--out", str(out),
         "--epochs", "1", *map(str, more)]
    )  # fmt: skip


def rows(folder):
    return list(csv.DictReader((folder / "predictions.csv").read_text("utf-8").splitlines()))


def test_a_folder_becomes_an_adapter_answers_and_a_report(model, pictures, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    out, named = pictures / "out/night.safetensors", pictures / "classes.txt"
    assert adapt(model, pictures, out, "--classes", named) == 0
    said = capsys.readouterr()
    assert "adapted" in said.out
    assert "round 1 of 1 is kept" in said.out
    assert "ending .txt × 1" in said.err
    assert "cannot be read × 1" in said.err
    answers, page = rows(out.with_name("night-report")), out.parent / "night-report/report.html"
    assert [r["item"] for r in answers] == ["0.png", *(f"{i}.tif" for i in range(1, 6))]
    assert {r["adapted"] for r in answers} <= {"cat", "dog"}
    assert "The adapter is kept: all rounds done" in page.read_text()
    assert "2 files skipped" in page.read_text()
    header = read_header(out)["data"]
    assert header == {
        "class_names": ["cat", "dog"], "input_size": [3, 32, 32], "mean": [0.5] * 3,
        "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.95,
    }  # fmt: skip
    # The file is what answered: classify gives the same classes and probabilities.
    common = ["--checkpoint", str(model), "--adapter", str(out), str(pictures / "night"), "--csv"]
    assert main(["classify", "--model", "test_vit", "--accelerator", "cpu", *common]) == 1
    found = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [r["class"] for r in found] == [r["adapted"] for r in answers]
    for mine, theirs in zip(found, answers, strict=True):
        assert float(mine["probability"]) == pytest.approx(
            float(theirs["adapted_confidence"]), abs=2e-4
        )
    # So does the merged file, whose header says the same.
    merged = out.with_name("merged.safetensors")
    common = ["--model", "test_vit", "--checkpoint", str(model), "--adapter", str(out)]
    assert main(["merge", *common, "--out", str(merged)]) == 0
    capsys.readouterr()
    common = ["classify", "--model", "test_vit", "--checkpoint", str(merged), "--csv"]
    assert main([*common, "--accelerator", "cpu", str(pictures / "night")]) == 1
    again = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [r["class"] for r in again] == [r["adapted"] for r in answers]
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "2: cat, dog" in shown
    assert "32 × 32 pixels, bicubic, 0.95 of the resized side" in shown


@pytest.mark.slow  # each process imports torch and timm
def test_several_at_once_give_the_files_of_one_after_the_other(model, pictures, monkeypatch):
    monkeypatch.undo()  # what this module's fixtures change, other processes do not see
    made = []
    for out, more in (("turn", []), ("once", ["--jobs", "2"])):
        assert adapt(model, pictures, pictures / out, *more, images=("night", "rain")) == 0
        made.append({p.relative_to(pictures / out): p.read_bytes()
                     for ending in ("csv", "safetensors", "svg")
                     for p in sorted((pictures / out).rglob(f"*.{ending}"))})  # fmt: skip
    assert made[0] == made[1]
    assert {p.name for p in made[0]} >= {"predictions.csv"}


def test_several_folders_share_a_base_and_are_resumed(model, pictures, capsys, monkeypatch):
    real, seen = run._one, []

    def interrupted(base, found, *rest):
        seen.append(found.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(base, found, *rest)

    monkeypatch.setattr(run, "_one", interrupted)
    out = pictures / "out"
    assert adapt(model, pictures, out, images=("night", "rain")) == 130
    first = (out / "night.safetensors").read_bytes()
    assert adapt(model, pictures, out, images=("night", "rain")) == 0
    assert seen == ["night", "rain", "rain"]
    assert "already there" in capsys.readouterr().out
    assert (out / "night.safetensors").read_bytes() == first
    assert rows(out / "rain-report")[0]["item"] == "cat/0.png"
    # The second started from the same base as the first.
    network = timm.create_model("test_vit", num_classes=2, img_size=32)
    weights = torch.load(model, weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("module."): v for k, v in weights.items()})
    load_adapter(network, out / "rain.safetensors")


def test_a_manifest_has_a_domain_for_each_adapter(model, pictures):
    lines = [{"path": f"night/{i}.tif", "domain": d} for i, d in ((1, "a"), (2, "a"), (3, "b/c"))]
    (pictures / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert adapt(model, pictures, pictures / "out", images=("all.jsonl",)) == 0
    folders = {p.name.partition("-")[0] for p in (pictures / "out").glob("*-report")}
    assert folders == {"a", "b_c"}


def test_the_source_is_kept_where_the_canary_falls(model, pictures, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    scores = iter([1.0, 0.5])
    monkeypatch.setattr(
        "lora_lightning.adaptation.target.Canary.accuracy", lambda *_: next(scores, 1.0)
    )
    out = pictures / "night.safetensors"
    assert adapt(model, pictures, out, "--canary", pictures / "labelled") == 0
    said = capsys.readouterr().out
    assert "kept source: " in said
    assert "the canary's accuracy falls from 100.0% to 50.0%" in said
    assert not out.exists()
    answers = rows(pictures / "night-report")
    assert all(r["source"] == r["adapted"] for r in answers)
    assert {r["source"] for r in answers} <= {"cat", "dog"}  # named by the canary's folders
    page = (pictures / "night-report/report.html").read_text()
    assert "The source model is kept, without adapter" in page


@pytest.mark.parametrize("few", [100, 3])
def test_it_learns_from_labels(few, model, pictures, capsys, monkeypatch):
    monkeypatch.setattr(training, "FEW", few)
    monkeypatch.setenv("COLUMNS", "400")
    items = sorted((pictures / "labelled").rglob("*.png"))
    lines = [f"{p.relative_to(pictures).as_posix()},{p.parent.name}" for p in items]
    (pictures / "labels.csv").write_text("\n".join(["path,label", *lines]))
    out = pictures / "night.safetensors"
    assert adapt(model, pictures, out, "--labels", pictures / "labels.csv") == 0
    said = capsys.readouterr().out
    assert ("6 pairs" if few == 100 else "right of 1 held-out pictures") in said
    assert out.exists() == ("adapted: " in said)
    assert len(rows(pictures / "night-report")) == 6


def test_how_far_a_folder_is(model, pictures, capsys):
    source = photos(pictures / "source", (".",), count=4)
    file = pictures / "statistics.safetensors"
    common = ["shift", *VIT, "--checkpoint", str(model), "--images", str(pictures / "night")]
    assert main([*common, "--source", str(source), "--save", str(file)]) == 0
    table = capsys.readouterr().out
    assert "shift: " in table
    assert main([*common, "--source", str(file)]) == 0
    assert capsys.readouterr().out == table
    out = pictures / "night.safetensors"
    assert adapt(model, pictures, out, "--source-statistics", file) == 0
    told = json.loads((pictures / "night-report/shift.json").read_text())["0"]["night"]
    assert f"shift: {told['verdict']}" in table
    page = (pictures / "night-report/report.html").read_text()
    assert "How far are the targets?" in page
    if told["expected_accuracy"] is None:  # and not a high one beside "too far"
        assert "No accuracy can be told for it" in page
    else:
        low, high = (100 * x for x in told["expected_interval"])
        right = 100 * told["expected_accuracy"]
        assert f"Expected accuracy {right:.0f} % ({low:.0f} to {high:.0f})" in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "nowhere"], "there is no file or folder"),
        (["--images", "classes.txt"], "is no folder and no table"),
        (["--images", "empty"], "holds no pictures"),
        (["--classes", "three.txt"], "names 3 classes, and the model has 2"),
        (["--classes", "classes.txt", "--canary", "odd"], "unknown class 'cow'"),
        (["--canary", "night"], "no pictures in folders of their classes"),
        (["--canary", "labelled", "--labels", "labelled"], "--canary or --labels"),
        (["--classes", "/dev/zero"], "/dev/zero is a device"),
        (["--size", "-1"], "--size must be a whole number of at least 1"),
        (["--seed", "-1"], "--seed must lie in"),
        (["--epochs", "0"], "--epochs must be a whole number of at least 1"),
        (["--images", "night", "rain"], "2 folders need a file each"),
        (["--checkpoint", "classes.txt"], "is damaged"),
    ],
)
def test_mistakes(more, message, model, pictures, capsys, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "empty").mkdir()
    (pictures / "three.txt").write_text("a\nb\nc\n")
    photos(pictures, ("odd",), ("cat", "cow"), count=1)
    assert adapt(model, pictures, pictures / "x.safetensors", *more) == 2
    assert message in capsys.readouterr().err
    assert not (pictures / "x.safetensors").exists()


def test_a_checkpoint_of_ones_own_needs_no_size(pictures, capsys):
    """A network that takes any size, its classes named by timm's own convention, in a folder."""
    network = timm.create_model("test_efficientnet", num_classes=2)
    cfg = {**network.pretrained_cfg, "input_size": (3, 32, 32), "label_names": ("Hund", "Katze")}
    folder = pictures / "hub"
    folder.mkdir()
    settings = {"architecture": "test_efficientnet", "num_classes": 2, "pretrained_cfg": cfg}
    settings["label_names"] = cfg["label_names"]
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    files = [str(pictures / f"night/{i}.tif") for i in (1, 2)]
    common = ["classify", "--model", f"local-dir:{folder}", "--accelerator", "cpu"]
    assert main([*common, "--top", "99999999999", *files]) == 0
    shown = capsys.readouterr().out
    assert "Hund" in shown
    assert "Katze" in shown


def test_sixteen_bits_of_a_tif_are_kept(pictures, model, capsys):
    deep = np.full((40, 40), 40_000, np.uint16)
    Image.fromarray(deep).save(pictures / "deep.tif")
    Image.fromarray((deep // 256).astype(np.uint8)).save(pictures / "flat.png")
    files = [str(pictures / name) for name in ("deep.tif", "flat.png")]
    assert main(["classify", *VIT, "--checkpoint", str(model), "--csv", *files]) == 0
    deep_row, flat_row = csv.reader(capsys.readouterr().out.splitlines()[1:])
    assert deep_row[1:] == flat_row[1:]
