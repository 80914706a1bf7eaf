"""Rendered sets: reuse, repair, and folders that are no such set."""

import json
import shutil
import sys

import numpy as np
import pytest

from lora_lightning.errors import ConfigError, DataError, MissingDependencyError
from lora_lightning.vision.data.synthetic import rendered
from lora_lightning.vision.data.synthetic.drawing import drawn
from lora_lightning.vision.data.synthetic.meshes import CLASSES
from lora_lightning.vision.data.synthetic.rendered import render_domains
from lora_lightning.vision.data.synthetic.scene import Renderer
from lora_lightning.vision.data.synthetic.worlds import WORLDS

pytest.importorskip("panda3d")
pytest.importorskip("trimesh")

SMALL = {"source": {"train": 1}, "side-3": {"test": 1}}


@pytest.fixture(scope="module", autouse=True)
def _few_classes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendered, "CLASSES", CLASSES[:3])
        yield


@pytest.fixture(scope="module")
def rendered_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "small"
    return render_domains(root, domains=SMALL, size=32, progress=False)


def test_layout_and_manifest(rendered_set):
    found = sorted(str(path.relative_to(rendered_set)) for path in rendered_set.rglob("*.png"))
    assert len(found) == 2 * len(rendered.CLASSES)
    assert f"side-3/test/{CLASSES[0]}/0000.png" in found
    manifest = json.loads((rendered_set / "manifest.json").read_text())
    assert manifest["files"] == len(found)
    assert manifest["settings"]["size"] == 32
    assert not [path for path in rendered_set.parent.iterdir() if path != rendered_set]


def test_several_processes_draw_the_same(rendered_set):
    settings = json.loads((rendered_set / "manifest.json").read_text())["settings"]
    items = list(rendered._items(settings))
    found = drawn(items[8:12], Renderer(32), WORLDS["lighting"], 0, processes=2)
    assert [d.png for d in found] == [(rendered_set / i.path).read_bytes() for i in items[8:12]]


def test_what_a_process_that_ends_leaves_is_drawn_here(rendered_set, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    item = rendered.Item("source", "train", CLASSES[0], 0)
    _, again = drawn([item, item], Renderer(32), WORLDS["lighting"], 0, processes=2)
    assert again.png == (rendered_set / item.path).read_bytes()


def test_a_complete_set_is_reused(rendered_set, monkeypatch):
    monkeypatch.setattr(rendered, "Renderer", None)  # rendering would fail
    assert render_domains(rendered_set, domains=SMALL, size=32, progress=False) == rendered_set


@pytest.mark.parametrize("damage", ["flip a bit", "remove", "add", "manifest", "seed"])
def test_a_damaged_set_is_rendered_again(rendered_set, damage):
    manifest = rendered_set / "manifest.json"
    victim = next(rendered_set.rglob("*.png"))
    good, before = victim.read_bytes(), json.loads(manifest.read_text())
    if damage == "flip a bit":
        victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "remove":
        victim.unlink()
    elif damage == "add":
        victim.with_name("9999.png").write_bytes(good)
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps(before | {"settings": before["settings"] | {"seed": 1}}))
    render_domains(rendered_set, domains=SMALL, size=32, progress=False)
    assert victim.read_bytes() == good
    assert json.loads(manifest.read_text()) == before
    assert not victim.with_name("9999.png").exists()


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendered.Item, "draw", fail)
    with pytest.raises(KeyboardInterrupt):
        render_domains(tmp_path / "set", domains=SMALL, size=32, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_left_alone(tmp_path):
    mine = tmp_path / "source" / "cat.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(DataError, match="no manifest"):
        render_domains(tmp_path, domains=SMALL, size=32, progress=False)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        render_domains(tmp_path, domains=SMALL, size=32, progress=False)
    assert mine.read_text() == "mine"


def test_the_cache_is_named_by_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path))
    domains = {"dim-1": {"test": 1}}
    roots = {render_domains(None, domains, size=16, seed=s, progress=False) for s in (0, 0, 1)}
    assert {root.parent for root in roots} == {tmp_path / "rendered"}
    assert len(roots) == 2


def shape(split, domain, index=0):
    """The corners of the first object of the set, as drawn."""
    kept = []

    class Spy:
        def render(self, parts, *_):
            kept.append(np.concatenate([part.mesh.vertices for part in parts]).tobytes())

    rendered.Item(domain, split, "car", index).draw(Spy(), WORLDS["lighting"][domain], 0)
    return kept[0]


def test_test_objects_are_shared_by_domains_and_never_trained_on():
    test = {shape("test", domain, i) for domain in ("source", "dim-1") for i in range(5)}
    train = {shape("train", domain, i) for domain in ("source", "dim-1") for i in range(5)}
    assert len(test) == 5
    assert len(train) == 10
    assert not test & train


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": {}}, "empty"),
        ({"domains": {"sids-3": {"test": 1}}}, "did you mean 'side-3'"),
        ({"domains": {"source": {"valid": 1}}}, "unknown split 'valid'"),
        ({"domains": {"source": {"test": 0}}}, "at least 1 picture a class, got 0"),
        ({"size": 8}, "got 8"),
        ({"seed": -1}, "got -1"),
        ({"shift": "light"}, "one of lighting, viewpoint, pose, environment; got 'light'"),
        ({"shift": "environment"}, "unknown domain 'side-3'"),
    ],
)
def test_settings_are_checked_first(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        render_domains(tmp_path / "set", **({"domains": SMALL} | settings))


@pytest.mark.parametrize("missing", ["panda3d", "trimesh"])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lora-lightning\[demo\]"'):
        render_domains(tmp_path / "set", domains=SMALL, size=32, progress=False)
    assert not list(tmp_path.iterdir())
