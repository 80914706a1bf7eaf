"""Rendered images: determinism, shapes, framing, lighting, fog and occlusion."""

from itertools import pairwise, product

import numpy as np
import pytest

from lora_lightning.errors import ConfigError
from lora_lightning.vision.data.synthetic.backgrounds import Background
from lora_lightning.vision.data.synthetic.lighting import LIGHTINGS, Lighting, ShadowMap
from lora_lightning.vision.data.synthetic.meshes import CLASSES, make_mesh
from lora_lightning.vision.data.synthetic.scene import Camera, Renderer
from lora_lightning.vision.data.synthetic.worlds import WORLDS, World, things_in_front

pytest.importorskip("panda3d")
pytest.importorskip("trimesh")

SIZE = 48


def picture(class_name="mug", lighting="source", seed=0, renderer=None):
    rng = np.random.default_rng(seed)
    parts, camera = make_mesh(class_name, rng), Camera.random(rng)
    background = Background.random(rng)
    return (renderer or Renderer(SIZE)).render(parts, camera, LIGHTINGS[lighting], background, rng)


@pytest.fixture(scope="module")
def lit():
    """The mean picture of the same five scenes under each light, from 0 to 1."""
    renderer = Renderer(SIZE)
    scenes = [(name, seed) for seed, name in enumerate(CLASSES[::2])]
    return {
        light: np.mean([picture(name, light, seed, renderer) for name, seed in scenes], 0) / 255
        for light in LIGHTINGS
    }


def test_same_seed_same_pixels_in_any_renderer():
    first, second = Renderer(SIZE), Renderer(SIZE)
    for name, seed in product(CLASSES, range(2)):
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


def test_each_kind_of_shift_has_a_source_and_three_severities():
    assert list(WORLDS) == ["lighting", "viewpoint", "pose", "environment"]
    for worlds in WORLDS.values():
        first, *targets = worlds
        kinds = list(dict.fromkeys(name.rpartition("-")[0] for name in targets))
        assert first == "source"
        assert targets == [f"{kind}-{i}" for kind in kinds for i in (1, 2, 3)]


def shot(world, class_name="car", seed=0):
    """The same scene in this world."""
    scene, here = (np.random.default_rng([seed, i]) for i in range(2))
    return world.picture(Renderer(SIZE), class_name, scene, here).pixels / 255


def test_fog_takes_contrast_and_more_of_what_is_farther():
    clear, light, thick = (shot(World(fog=f)) for f in (0.0, 1.0, 3.0))
    assert clear.std() > 1.5 * light.std() > 3 * thick.std()
    with_background = [shot(World(fog=f, backgrounds=("checks",))) for f in (0.0, 1.5)]
    top = [p[:8].std() / p[20:28, 20:28].std() for p in with_background]  # far : near
    assert top[1] < top[0]


@pytest.mark.parametrize("share", [0.15, 0.45])
def test_things_in_front_hide_their_share(share):
    cover = things_in_front(64, share, np.random.default_rng(0))
    assert set(np.unique(cover[..., 3])) == {0, 1}
    assert share <= cover[..., 3].mean() < share + 0.1
    hidden = np.abs(shot(World(cover=share)) - shot(World())).max(2) > 0.02
    assert 0.8 * share < hidden.mean() < share + 0.15


def test_views_lie_in_their_ranges_on_both_sides(monkeypatch):
    seen = []
    monkeypatch.setattr(Renderer, "render", lambda self, parts, camera, *rest: seen.append(camera))
    for i in range(40):
        scene, here = np.random.default_rng(i), np.random.default_rng([i, 1])
        WORLDS["viewpoint"]["rear-2"].picture(Renderer(SIZE), "car", scene, here)
    assert all(135 <= abs(c.azimuth) <= 155 and 10 <= c.elevation <= 35 for c in seen)
    assert 8 < sum(c.azimuth > 0 for c in seen) < 32


def test_jitter_moves_the_light_a_little():
    rng = np.random.default_rng(0)
    azimuths = [LIGHTINGS["side-2"].jittered(rng).azimuth for _ in range(50)]
    assert np.ptp(azimuths) > 10
    assert max(abs(azimuth - LIGHTINGS["side-2"].azimuth) for azimuth in azimuths) < 20


def test_an_unknown_class_is_refused():
    with pytest.raises(ConfigError, match="unknown class 'cow'; the classes are airplane, "):
        make_mesh("cow", np.random.default_rng(0))


def test_light_may_come_from_straight_above():
    shadow = ShadowMap(Lighting(elevation=90), np.full(3, 0.4, np.float32))
    assert shadow.axes @ shadow.axes.T == pytest.approx(np.eye(3), abs=1e-6)
