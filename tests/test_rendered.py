"""Rendered objects: the same seed gives the same pixels, and the lights are what they claim."""

import builtins
import json
from itertools import pairwise, product

import numpy as np
import pytest

from lora_lightning.data import rendered
from lora_lightning.data.backgrounds import Background
from lora_lightning.data.lighting import LIGHTINGS
from lora_lightning.data.meshes import CLASSES, make_mesh
from lora_lightning.data.rendered import DEFAULT_DOMAINS, render_domains
from lora_lightning.data.scene import Camera, Renderer
from lora_lightning.errors import ConfigError, DataError, MissingDependencyError

pytest.importorskip("panda3d")
pytest.importorskip("trimesh")

SIZE = 48
SMALL = {"source": {"train": 1, "test": 1}, "side-3": {"test": 1}}


def picture(class_name="mug", lighting="source", seed=0, renderer=None):
    rng = np.random.default_rng(seed)
    parts, camera = make_mesh(class_name, rng), Camera.random(rng)
    background = Background.random(rng)
    return (renderer or Renderer(SIZE)).render(parts, camera, LIGHTINGS[lighting], background, rng)


@pytest.fixture(scope="module")
def lit():
    """The mean picture of the same twenty scenes under each light, from 0 to 1."""
    renderer = Renderer(SIZE)
    scenes = [(name, seed) for name in CLASSES for seed in range(2)]
    return {
        light: np.mean([picture(name, light, seed, renderer) for name, seed in scenes], 0) / 255
        for light in LIGHTINGS
    }


@pytest.fixture(scope="module")
def rendered_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "small"
    return render_domains(root, domains=SMALL, size=32, progress=False)


def test_same_seed_same_pixels_in_any_renderer():
    first, second = Renderer(SIZE), Renderer(SIZE)
    for name, seed in product(CLASSES, range(6)):
        one, two = (picture(name, seed=seed, renderer=each) for each in (first, second))
        assert one.shape == (SIZE, SIZE, 3)
        assert one.dtype == np.uint8
        assert np.array_equal(one, two)
    assert not np.array_equal(picture(seed=1), picture(seed=2))


def test_renderers_of_different_sizes_coexist():
    small, large = Renderer(32), Renderer(64)
    pairs = [(picture(renderer=small), picture(renderer=large)) for _ in range(2)]
    assert pairs[0][0].shape == (32, 32, 3)
    assert all(np.array_equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
    shrunk = pairs[0][1].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(shrunk - pairs[0][0]).mean() < 8  # the same scene, only finer


@pytest.mark.parametrize("name", CLASSES)
def test_every_instance_has_its_own_shape(name):
    shapes = [make_mesh(name, np.random.default_rng(seed)) for seed in range(6)]
    points = [np.concatenate([part.mesh.vertices for part in parts]) for parts in shapes]
    assert len({cloud.tobytes() for cloud in points}) == 6
    assert all(part.mesh.volume > 0 for parts in shapes for part in parts)  # facing outwards
    for cloud in points:
        assert np.isfinite(cloud).all()
        assert cloud[:, 2].min() == pytest.approx(0)  # it stands on the ground
        assert np.linalg.norm(np.ptp(cloud, axis=0)) == pytest.approx(2)


def test_the_object_is_framed():
    rng = np.random.default_rng(0)
    for name in CLASSES:
        parts, camera = make_mesh(name, rng), Camera(fill=0.7)
        points = np.concatenate([part.mesh.vertices for part in parts])
        seen = (points - camera.place(points)) @ camera.axes.T
        flat = seen[:, [0, 2]] / seen[:, [1]] / np.tan(np.radians(camera.fov / 2))
        assert np.ptp(flat, axis=0).max() / 2 == pytest.approx(0.7, abs=0.02)
        assert np.abs(flat.max(0) + flat.min(0)).max() < 0.05


def test_dim_is_darker_the_more_severe(lit):
    means = [lit[name].mean() for name in ("source", "dim-1", "dim-2", "dim-3")]
    assert all(a > 1.25 * b for a, b in pairwise(means))


def test_coloured_is_tinted_the_more_severe(lit):
    def spread(name):
        channels = lit[name].mean((0, 1))
        return channels.min() / channels.max()

    ratios = [spread(f"coloured-{severity}") for severity in (1, 2, 3)]
    assert spread("source") > 0.85
    assert spread("source") > ratios[0] > ratios[1] > ratios[2]


def test_side_light_comes_from_the_left(lit):
    def left_to_right(name):
        halves = np.split(lit[name].mean((0, 2)), 2)
        return halves[0].mean() / halves[1].mean()

    assert left_to_right("source") == pytest.approx(1, abs=0.08)
    assert all(left_to_right(f"side-{severity}") > 1.12 for severity in (1, 2, 3))


def test_low_light_is_brighter_below_the_more_severe(lit):
    def below_to_above(name):
        above, _, below = np.split(lit[name], 3)
        return below.mean() / above.mean()

    values = [below_to_above(name) for name in ("low-3", "low-2", "low-1", "source")]
    assert all(a > 1.05 * b for a, b in pairwise(values))


def test_there_are_four_kinds_of_three_severities():
    kinds = ("dim", "low", "side", "coloured")
    assert set(LIGHTINGS) == {"source"} | {f"{kind}-{i}" for kind in kinds for i in (1, 2, 3)}
    assert set(DEFAULT_DOMAINS) == set(LIGHTINGS)


def test_jitter_moves_the_light_a_little():
    rng = np.random.default_rng(0)
    azimuths = [LIGHTINGS["side-2"].jittered(rng).azimuth for _ in range(50)]
    assert np.ptp(azimuths) > 10
    assert max(abs(azimuth - LIGHTINGS["side-2"].azimuth) for azimuth in azimuths) < 20


def test_layout_and_manifest(rendered_set):
    found = sorted(str(path.relative_to(rendered_set)) for path in rendered_set.rglob("*.png"))
    assert len(found) == 3 * len(CLASSES)
    assert f"side-3/test/{CLASSES[0]}/0000.png" in found
    manifest = json.loads((rendered_set / "manifest.json").read_text())
    assert manifest["files"] == len(found)
    assert manifest["settings"]["size"] == 32
    assert not [path for path in rendered_set.parent.iterdir() if path != rendered_set]


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

    monkeypatch.setattr(rendered._Item, "draw", fail)
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
    roots = {render_domains(domains=domains, size=16, seed=s, progress=False) for s in (0, 0, 1)}
    assert {root.parent for root in roots} == {tmp_path / "rendered"}
    assert len(roots) == 2


def shape(split, domain, index=0):
    """The corners of the first object of the set, as drawn."""
    kept = []

    class Spy:
        def render(self, parts, *_):
            kept.append(np.concatenate([part.mesh.vertices for part in parts]).tobytes())

    rendered._Item(domain, split, "car", index).draw(Spy(), LIGHTINGS[domain], 0)
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
    ],
)
def test_settings_are_checked_first(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        render_domains(tmp_path / "set", **settings)
    with pytest.raises(ConfigError, match="unknown class 'cow'; the classes are airplane, "):
        make_mesh("cow", np.random.default_rng(0))


@pytest.mark.parametrize("missing", ["panda3d", "trimesh"])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, missing):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r'pip install "lora-lightning\[demo\]"'):
        render_domains(tmp_path / "set", domains=SMALL, size=32, progress=False)
    assert not list(tmp_path.iterdir())
