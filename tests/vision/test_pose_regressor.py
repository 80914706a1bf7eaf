"""Pose regression: circular errors, labels, mirror images, adaptation without labels, reports."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lora_lightning.adaptation.closed_form import ALIGNMENTS, regressed
from lora_lightning.errors import ConfigError, DataError, DataNotFoundError
from lora_lightning.report import plots
from lora_lightning.report.html import page
from lora_lightning.report.metrics import AZIMUTH_ERROR, angle_between
from lora_lightning.report.plots.angles import angle_plot
from lora_lightning.report.plots.domains import domain_plot
from lora_lightning.report.plots.speech import target_plot
from lora_lightning.report.results import Prediction
from lora_lightning.report.summary import Summary
from lora_lightning.report.write import verdict
from lora_lightning.runner.loading import load_recipe, run_recipe
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.vision.data.pose_domains import (
    LABELS,
    Pose,
    PoseDomains,
    read_poses,
    write_poses,
)
from lora_lightning.vision.data.synthetic.meshes import FRONTS, make_mesh
from lora_lightning.vision.data.synthetic.rendered import render_domains
from lora_lightning.vision.data.synthetic.scene import Renderer
from lora_lightning.vision.data.synthetic.worlds import WORLDS
from lora_lightning.vision.pose_guard import PoseLimits, Twice, judge
from lora_lightning.vision.pose_recipe import METHODS
from lora_lightning.vision.pose_regressor import (
    PoseRegressor,
    angle,
    circular_error,
    direction,
    mirrored,
)
from lora_lightning.vision.pose_self_training import TransductivePose
from tests.helpers.miniature import TINY, photos
from tests.helpers.networks import Sides
from tests.helpers.report_runs import FULL, LORA, SOURCE, make_run, row
from tests.helpers.training import trainer

POSES = {"source": {"train": 2, "test": 2}, "side-3": {"train": 2, "test": 2}}


# ---- the circle ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [(359, 1, 2), (-179, 179, 2), (0, 180, 180), (10, 370, 0), (-30, 30, 60), (720, -90, 90)],
)
def test_errors_go_the_short_way_round(one, other, apart):
    a, b = torch.tensor([float(one)]), torch.tensor([float(other)])
    assert circular_error(a, b).item() == circular_error(b, a).item() == apart
    assert angle_between(one, other) == angle_between(other, one) == apart


def test_angles_and_vectors_are_inverse_and_a_mirror_negates():
    degrees = torch.arange(-179.0, 181.0)
    assert circular_error(angle(direction(degrees)), degrees).max() < 1e-3
    back = angle(mirrored(3 * direction(degrees)))
    assert circular_error(back, -degrees).max() < 1e-3


def test_the_loss_is_least_for_the_circular_mean_and_its_length():
    degrees = torch.tensor([170.0, -150.0, 175.0, -160.0])
    module = PoseRegressor(_Constant(), learning_rate=0.1)
    module.log = lambda *args, **kwargs: None
    batch = (torch.zeros(4, 3, 8, 8), degrees)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    mean = torch.polar(torch.ones(4), degrees.deg2rad()).mean()
    found = module(batch[0])[0].detach()
    assert circular_error(angle(found), mean.angle().rad2deg()).item() < 0.1
    assert found.norm().item() == pytest.approx(mean.abs().item(), abs=1e-3)


class _Constant(nn.Module):
    """The same vector for every picture."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.tensor([0.3, 0.4]))

    def forward(self, x):
        return self.vector.expand(len(x), 2)


def test_a_network_of_another_width_is_told():
    module = PoseRegressor(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    with pytest.raises(ConfigError, match=r"shape \(1, 3\).*num_classes=2"):
        module(torch.zeros(1, 3, 2, 2))


# ---- labels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    pytest.importorskip("panda3d")
    root = tmp_path_factory.mktemp("poses") / "set"
    return render_domains(root, POSES, shift="pose", size=36, progress=False)


def test_labels_are_what_the_camera_saw(tmp_path, monkeypatch):
    pytest.importorskip("panda3d")
    seen = []
    render = Renderer.render

    def spy(self, parts, camera, *rest):
        seen.append(camera)
        return render(self, parts, camera, *rest)

    monkeypatch.setattr(Renderer, "render", spy)
    domains = {"source": {"train": 1}, "side-2": {"test": 2}}
    root = render_domains(tmp_path / "set", domains, shift="pose", size=16, progress=False)
    poses = read_poses(root)
    assert {name.split("/")[2] for name in poses} == set(FRONTS)
    assert [p.azimuth for p in poses.values()] == pytest.approx([c.azimuth for c in seen], abs=1e-3)
    assert [p.elevation for p in poses.values()] == pytest.approx(
        [c.elevation for c in seen], abs=1e-3
    )
    assert all(30 <= abs(p.azimuth) <= 90 for n, p in poses.items() if n.startswith("side-2"))


def facing(name, seed):
    """The vertices of an object that faces the viewer."""
    parts = make_mesh(name, np.random.default_rng(seed), facing=True)
    return np.concatenate([part.mesh.vertices for part in parts])


@pytest.mark.parametrize("name", FRONTS)
def test_at_azimuth_zero_an_object_is_its_own_mirror_image_in_outline(name):
    pytest.importorskip("trimesh")
    for seed in range(4):
        points = facing(name, seed)
        low, high = points.min(0), points.max(0)
        assert high[0] == pytest.approx(-low[0], abs=0.06)  # as far to the left as to the right


def test_the_front_looks_at_the_viewer():
    pytest.importorskip("trimesh")
    for seed in range(4):
        car, chair = (facing(name, seed) for name in ("car", "chair"))
        long, wide = np.ptp(car[:, 1]), np.ptp(car[:, 0])
        assert long > wide  # it drives towards the viewer, who stands at -y
        assert car[car[:, 2].argmax(), 1] > np.median(car[:, 1]) - 0.3 * long
        high = chair[chair[:, 2] > 0.8 * chair[:, 2].max()]
        assert high[:, 1].mean() > 0  # the back is behind the seat


def test_what_has_no_front_cannot_face():
    with pytest.raises(ConfigError, match="'bowl' has no front; those with one are airplane"):
        make_mesh("bowl", np.random.default_rng(0), facing=True)


def test_a_set_without_its_labels_is_made_again(tmp_path):
    pytest.importorskip("panda3d")

    def labels():
        few = {"source": {"train": 1}}
        root = render_domains(tmp_path / "set", few, shift="pose", size=16, progress=False)
        return root / LABELS

    content = labels().read_bytes()
    labels().unlink()
    assert labels().read_bytes() == content


def test_pictures_come_with_their_azimuth_and_mirrored_ones_with_its_negative(rendered):
    data = PoseDomains(rendered, "source", size=32, batch_size=8)
    data.setup()
    known = read_poses(rendered)
    assert {round(v.azimuth, 3) for n, v in known.items() if "source/train" in n} == {
        round(float(a), 3) for _, a in data.unlabelled()
    }
    plain = {round(float(a), 3): x for x, a in data.unlabelled()}
    data.train_transform = data.test_transform  # no random crop
    torch.manual_seed(0)
    turned = 0
    for _ in range(4):
        for xs, angles in data.train_dataloader():
            for x, a in zip(xs, angles.tolist(), strict=True):
                a, turned = round(a, 3), turned + (round(a, 3) not in plain)
                wanted = plain[a] if a in plain else plain[-a].flip(-1)
                assert torch.equal(x, wanted)
    assert 8 < turned < 24  # of 32
    straight = PoseDomains(rendered, "source", size=32, horizontal_flip=False)
    straight.setup()
    [(_, angles)] = straight.on(train=["source"]).train_dataloader()
    assert {round(a, 3) for a in angles.tolist()} == set(plain)
    side = straight.on(test=["side-3"])
    [(_, angles)] = side.predict_dataloader()
    wanted = [known[side.item_name(i)].azimuth for i in side.held_out()]
    assert angles.tolist() == pytest.approx(wanted)


def test_a_mirrored_picture_is_that_of_the_mirrored_view():
    """Of a symmetric object under a light from the front; the background is plain."""
    pytest.importorskip("panda3d")
    from lora_lightning.vision.data.synthetic.backgrounds import Background
    from lora_lightning.vision.data.synthetic.lighting import Lighting
    from lora_lightning.vision.data.synthetic.meshes import Material
    from lora_lightning.vision.data.synthetic.scene import Camera

    grey = np.full(3, 0.5)
    material = Material("plain", grey, grey, 1.0, True)
    parts = [
        dataclasses.replace(p, material=material)
        for p in make_mesh("car", np.random.default_rng(3), facing=True)
    ]
    drawn = {}
    for azimuth in (-40.0, 40.0, 20.0):
        rng = np.random.default_rng(0)
        background = Background.random(np.random.default_rng(1), ("plain",))
        light = Lighting(noise=0)
        image = Renderer(48).render(parts, Camera(azimuth), light, background, rng)
        drawn[azimuth] = image.astype(float)
    same = np.abs(drawn[40.0][:, ::-1] - drawn[-40.0]).mean()
    assert same < 0.3 * np.abs(drawn[20.0][:, ::-1] - drawn[-40.0]).mean()


def test_poses_round_trip_and_a_missing_elevation_is_fine(tmp_path):
    poses = {"a/b.png": Pose(-12.5, 30.0), "a/ä, c.png": Pose(170.25)}
    write_poses(tmp_path, poses)
    found = read_poses(tmp_path)
    assert found["a/b.png"] == poses["a/b.png"]
    assert found["a/ä, c.png"].azimuth == 170.25
    assert math.isnan(found["a/ä, c.png"].elevation)
    (tmp_path / LABELS).write_text("item,azimuth\nx.png,350\n")
    assert read_poses(tmp_path)["x.png"].azimuth == 350


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,angle\nx,3\n", "no column azimuth; its header must be 'item,azimuth'"),
        ("item,azimuth\nx,left\n", "line 2: azimuth must be an angle in degrees, got 'left'"),
        ("item,azimuth\nx,\n", "line 2: azimuth must be an angle in degrees, got ''"),
        ("item,azimuth\nx,nan\n", "got 'nan'"),
        ("item,azimuth,elevation\nx,3,inf\n", "elevation must be an angle in degrees, got 'inf'"),
        ("", "no column azimuth, item"),
    ],
)
def test_mistakes_in_labels(tmp_path, text, message):
    (tmp_path / LABELS).write_text(text)
    with pytest.raises(DataError, match=message):
        read_poses(tmp_path)


def test_pictures_without_labels_are_told(tmp_path):
    root = photos(tmp_path / "own")
    with pytest.raises(DataNotFoundError, match=r"there is no .*labels\.csv: it tells the azimuth"):
        PoseDomains(root, "day").setup()
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    write_poses(root, {name: Pose(0.0) for name in names[1:]})
    with pytest.raises(DataError, match=rf"no line for 1 of 24 pictures, such as {names[0]}"):
        PoseDomains(root, "day", size=32).setup()


# ---- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", list(ALIGNMENTS))
def test_a_moved_and_scaled_target_is_regressed(alignment):
    g = torch.Generator().manual_seed(0)
    degrees = 120 * torch.rand(300, generator=g) - 60
    noise = [0.1 * torch.randn(300, 10, generator=g) for _ in range(2)]
    plane = torch.zeros(2, 10)
    plane[0, :5] = plane[1, 5:] = 1
    source, target = (direction(degrees) @ plane + n for n in noise)
    found = regressed(source, direction(degrees), 3 * target + 5, alignment)
    assert found.shape == (300, 2)
    assert circular_error(angle(found), degrees).mean() < 8
    assert torch.equal(regressed(source, direction(degrees), 3 * target + 5, alignment), found)


def test_ridge_regression_is_its_equation():
    g = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, 60, 5, generator=g).double()
    values = torch.randn(60, 2, generator=g).double()
    from sklearn.linear_model import RidgeCV

    s, t = ((x - x.mean(0)) / x.std(0, correction=0) for x in (source, target))
    strength = RidgeCV(np.logspace(-2, 5, 15)).fit(s.numpy(), values.numpy()).alpha_
    mean = values.mean(0)
    weights = torch.linalg.solve(s.T @ s + strength * torch.eye(5).double(), s.T @ (values - mean))
    torch.testing.assert_close(
        regressed(source, values, target).double(), t @ weights + mean, atol=1e-5, rtol=1e-4
    )


def test_what_cannot_be_regressed_is_said():
    x = torch.randn(6, 4)
    with pytest.raises(ConfigError, match="alignment must be one of none, subspace, nmf, coral"):
        regressed(x, torch.zeros(6, 2), x, "corral")
    with pytest.raises(DataError, match="do not fit"):
        regressed(x, torch.zeros(5, 2), x)
    with pytest.raises(DataError, match=r"finite numbers \(N, V\), got \(6,\)"):
        regressed(x, torch.zeros(6), x)


# ---- without labels -----------------------------------------------------------------------------


def sides(count=32, seed=0):
    """Pictures of two grey halves, and the angles that `Sides()` reads off them."""
    g = torch.Generator().manual_seed(seed)
    halves = torch.rand(count, 2, generator=g) + 0.2
    pictures = halves.repeat_interleave(4, dim=1)[:, None, None].expand(count, 3, 8, 8).clone()
    return pictures, angle(Sides()(pictures)).detach()


def adapted(model, pictures, epochs=3, schedule="constant", **settings):
    task = TransductivePose(model, pictures, batch_size=8, schedule=schedule, **settings)
    torch.manual_seed(0)
    trainer(None, max_epochs=epochs).fit(task)
    return task


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_a_preference_for_a_side_is_unlearnt_without_labels(schedule):
    pictures, angles = sides()
    model = Sides(skew=0.3)
    before = circular_error(angle(model(pictures)), angles).mean().item()
    task = adapted(model, pictures, 8, schedule, learning_rate=0.02)
    after = circular_error(angle(model.eval()(pictures)), angles).mean().item()
    assert after < 0.5 * before
    assert task.accepted_ == 8 if schedule == "one-cycle" else task.accepted_ > 0
    kept = task.answers_.plain
    torch.testing.assert_close(kept, model(pictures).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "preference", "rounds", "why"),
    [
        ("constant", 0, 1, "agree no better"),
        ("one-cycle", 0, 3, "agree no better"),  # the last round decides
        ("one-cycle", 0.25, 0, "without a preference .* preference=0 trains all the same"),
    ],
)
def test_what_brings_nothing_leaves_the_source_model_bit_for_bit(schedule, preference, rounds, why):
    pictures, _ = sides()
    model = Sides()  # its answers to mirror images agree: there is nothing to gain
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = adapted(model, pictures, 3, schedule, learning_rate=0.05, preference=preference)
    assert task.accepted_ == 0
    assert len(task.history_) == 1 + rounds
    assert re.search(why, task.termination_condition_)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_learning_rate_that_breaks_the_weights_is_noticed():
    pictures, _ = sides()
    model = Sides(skew=0.3)
    task = adapted(model, pictures, learning_rate=1e30)
    assert task.accepted_ == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_judge_sees_collapse_and_flight():
    degrees = torch.linspace(-170, 170, 60)
    good = Twice(direction(degrees), direction(degrees + 10))
    limits = PoseLimits()
    assert judge(good, good, good, limits).accepted
    alike = Twice(*[direction(torch.zeros(60))] * 2)
    assert "collapse" in " ".join(judge(good, good, alike, limits).alarms)
    far = Twice(*[direction(degrees + 90)] * 2)
    assert "moved by 90.0 degrees" in " ".join(judge(good, good, far, limits).alarms)
    nan = Twice(good.plain * math.nan, good.mirror)
    assert "NaN" in judge(good, good, nan, limits).alarms[0]


def test_concordance_is_not_raised_by_answers_that_shrink_or_by_a_preference():
    g = torch.Generator().manual_seed(0)
    degrees = 40 * torch.rand(200, generator=g) - 20
    noise = 5 * torch.randn(2, 200, generator=g)

    def of(scale, offset=0.0):
        return Twice(
            *(
                direction(scale * (degrees + n) + s * offset)
                for n, s in zip(noise, (1, -1), strict=True)
            )
        )

    whole = of(1)
    assert of(0.2).apart.mean() < 0.3 * whole.apart.mean()  # in degrees it looks like progress
    assert of(0.2).concordance == pytest.approx(whole.concordance, abs=0.02)
    assert of(1, offset=10).concordance < whole.concordance - 0.2
    exact = Twice(direction(degrees), direction(degrees))
    assert exact.concordance == pytest.approx(1)
    assert judge(whole, whole, exact, PoseLimits()).accepted
    assert "agree no better" in judge(whole, whole, of(0.99, 10), PoseLimits()).alarms[0]


def test_one_picture_and_labels_that_are_not_looked_at():
    pictures, angles = sides(9)
    wrong = [(x, a) for x, a in zip(pictures, angles + 90, strict=True)]
    one, other = (adapted(Sides(0.3), x, learning_rate=0.02) for x in (pictures, wrong))
    torch.testing.assert_close(one.answers_.plain, other.answers_.plain)
    assert len(adapted(Sides(0.3), pictures[:1]).answers_.plain) == 1


def test_only_factors_are_trained_and_come_off(tmp_path):
    pictures, _ = sides()
    model = Sides(skew=0.3)
    before = model.fc.weight.detach().clone()
    task = TransductivePose(model, pictures, batch_size=8)
    lora = LoRACallback(
        rank=1, target_modules=["fc"], trainable=[], verify=False, output_dir=tmp_path
    )
    trainer(tmp_path, lora, max_epochs=1).fit(task)
    assert torch.equal(model.fc._parameters["weight"], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, r"tolerance must lie in \(0, 180\] degrees, got 0"),
        ({"preference": -1.0}, r"preference must lie in \[0, 1\], got -1"),
        ({"batch_norm": "both"}, "batch_norm must be one of auto, source, target; got 'both'"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_mistakes_in_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TransductivePose(Sides(), torch.zeros(2, 3, 8, 8), **settings)


def test_mistakes_in_limits():
    with pytest.raises(ConfigError, match="spread"):
        PoseLimits(spread=1.5)
    with pytest.raises(ConfigError, match="moved"):
        PoseLimits(moved=-1)


# ---- what people are shown ----------------------------------------------------------------------


def degrees_run(root, **changes):
    base = {"source": 5.04, "side-1": 20.0, "side-2": 40.0, "side-3": 90.0}
    rows = []
    for seed in (0, 1):
        for domain, value in base.items():
            rows += [
                row(SOURCE, domain, seed, value, metric=AZIMUTH_ERROR),
                row(LORA, domain, seed, value / 4 + seed, metric=AZIMUTH_ERROR),
                row(FULL, domain, seed, value / 5, metric=AZIMUTH_ERROR),
            ]
    answers = [
        Prediction(f"side-1/{i}.png", "side-1", "179.0", "-179.0", 0.9, "90.0", 0.4, 0)
        for i in range(3)
    ]
    settings = {"metric": AZIMUTH_ERROR, "predictions": answers, **changes}
    return make_run(root, rows, **settings)


def test_degrees_are_degrees_everywhere(tmp_path):
    run = degrees_run(tmp_path)
    summary = Summary(run)
    assert summary.lower
    assert summary.cell(SOURCE, ["side-3"]).texts() == ("90.0", "± 0.0")
    assert summary.cell(LORA, ["side-1"]).texts() == ("5.5", "± 0.7")
    assert FULL in summary.best()
    assert summary.footnote().startswith("In degrees, mean ± sd over 2 seeds")
    said = verdict(run)
    assert "lowers azimuth error from 50.0° to 13.0°, 74 % less" in said
    assert "3.0° above full fine-tuning" in said
    assert "%" not in said.replace("74 % less", "").replace(" % of its trainable parameters", "")
    text = page(run, [], said)
    assert "In degrees" in text
    assert "sev. 1" in text


def test_plots_of_angles_show_circular_errors_in_degrees(tmp_path):
    run = degrees_run(tmp_path)
    names = [p.name for p in plots.draw(run)]
    assert "angles" in names
    assert not {"confusion", "targets"} & set(names)
    figure, _ = angle_plot(run) or pytest.fail("no plot")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].startswith("before: off by 2.0°")
    assert titles[1].startswith("after: off by 89.0°")
    figure, caption = domain_plot(run) or pytest.fail("no plot")
    assert figure.axes[0].get_ylabel() == "azimuth error (degrees)"
    assert "lower is better" in caption
    line = figure.axes[0].containers[0][0]
    assert line.get_ydata().tolist() == pytest.approx([5.04, 20, 40, 90])
    run.rows = [dataclasses.replace(r, domain=r.domain.replace("-", " ")) for r in run.rows]
    figure, _ = target_plot(run) or pytest.fail("no plot")  # of domains without severities
    assert figure.axes[0].get_xlabel() == "azimuth error (degrees)"
    line = figure.axes[0].containers[0][0]
    assert sorted(line.get_xdata()) == pytest.approx([20, 40, 90])


def test_other_metrics_have_no_plot_of_angles(tmp_path):
    run = degrees_run(tmp_path, metric="accuracy")
    assert angle_plot(run) is None


# ---- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on the user's own pictures, of one class."""
    root = photos(tmp_path_factory.mktemp("photos"), classes=("chair",))
    rng = np.random.default_rng(0)
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.png")]
    write_poses(root, {name: Pose(float(rng.uniform(-180, 180))) for name in sorted(names)})
    out = tmp_path_factory.mktemp("out")
    methods = f"methods=[{','.join(METHODS)}]"
    own = [f"data.root={root}", "data.source=day", "seeds=[3]", methods]
    return out, own, run_recipe("pose", [*TINY, *own], out)


def test_rows_are_mean_circular_errors_of_the_predictions(ran):
    out, _, result = ran
    assert set(load_recipe("pose").methods) <= set(METHODS)
    assert len({r.method for r in result.rows}) == len(METHODS)
    assert {r.metric for r in result.rows} == {AZIMUTH_ERROR}
    for method, of in ((SOURCE, "source"), (LORA, "adapted")):
        value = next(r.value for r in result.rows if (r.method, r.domain) == (method, "night"))
        mine = [p for p in result.predictions if p.split == "held-out"]
        off = [angle_between(float(p.label), float(getattr(p, of))) for p in mine]
        assert value == pytest.approx(np.mean(off), abs=0.1)
    made = {p.name for p in out.iterdir()}
    assert made >= {
        "results.json", "predictions.csv", "report.html", "config.yaml", "adapter.safetensors",
        "source.safetensors",
    }  # fmt: skip
    [learnt] = {r.trainable_parameters for r in result.rows if r.method == "LoRA, no labels"}
    assert (learnt > 0) == ("adapter_no_labels.safetensors" in made)
    with (out / "predictions.csv").open() as file:
        assert all(-180 <= float(r["adapted"]) <= 180 for r in csv.DictReader(file))


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_gives_the_same_table(ran, tmp_path):
    _, own, first = ran
    methods = "methods=[subspace,label_free,lora]"
    again = run_recipe("pose", [*TINY, *own, methods], tmp_path)
    before = {(r.method, r.domain): r.value for r in first.rows}
    assert all(before[r.method, r.domain] == r.value for r in again.rows)


@pytest.mark.parametrize("value", ["epochs=0", "jitter=2", "tolerance=200", "batch_norm=thaw"])
def test_settings_are_checked_before_anything_is_trained(value, tmp_path):
    overrides = [f"data.root={tmp_path}", f"train.label_free.{value}", "accelerator=cpu"]
    with pytest.raises(ConfigError, match=value.split("=")[0]):
        run_recipe("pose", overrides, tmp_path / "out")


def test_a_picture_that_is_damaged_needs_no_label(tmp_path):
    root = photos(tmp_path / "own", classes=("chair",))
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.png")]
    write_poses(root, {name: Pose(10.0) for name in names})
    (root / "day/chair/broken.png").write_text("no picture")
    data = PoseDomains(root, "day", size=32)
    data.setup()
    assert [path for path, _ in data.skipped] == ["day/chair/broken.png"]


def test_the_worlds_of_poses_overlap_with_the_source_ever_less():
    worlds = WORLDS["pose"]
    assert all(w.facing for w in worlds.values())
    for kind, angles in (("side", "azimuth"), ("top", "elevation")):
        names = ("source", *(f"{kind}-{i}" for i in (1, 2, 3)))
        graded = [getattr(worlds[name], angles) for name in names]
        assert all(a[0] < b[0] < a[1] < b[1] for a, b in pairwise(graded))
        assert graded[1][0] < graded[0][1]
    assert {w.azimuth for n, w in worlds.items() if not n.startswith("side")} == {(0, 60)}
