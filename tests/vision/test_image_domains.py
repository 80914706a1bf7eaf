"""Image folders: layouts, splits, unreadable files, and errors."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning.adaptation.target import Target
from lora_lightning.errors import ConfigError, DataError, DataNotFoundError
from lora_lightning.speech.data.manifests import load_utterances
from lora_lightning.vision.data.folders import find_domains, other_files, pictures_below, scan
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.data.pictures import read_picture
from tests.helpers.miniature import photos


def draw(path, value=100, size=(40, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 30, (size[1], size[0], 3))
    Image.fromarray((noise + value).astype(np.uint8)).save(path, **options)


def folders(root, count=5, **options):
    return photos(root, count=count, **options)


def pictures(root, **options):
    data = ImageDomains(root, "day", size=28, batch_size=4, **options)
    data.setup()
    return data


def paths(data, split):
    return {i.path for i in data.items if i.split == split}


def test_folders_without_splits_are_split_by_class_and_seed(tmp_path):
    folders(tmp_path)
    data, again, other = pictures(tmp_path), pictures(tmp_path), pictures(tmp_path, seed=1)
    assert data.classes == ["cat", "dog"]
    assert data.target == ["night"]
    assert len(paths(data, "test")) == 2 * 2 * 2  # 0.3 of 5 is 2, for each class and domain
    assert not paths(data, "test") & paths(data, "train")
    assert paths(data, "test") == paths(again, "test") != paths(other, "test")


def test_another_domain_does_not_move_a_split(tmp_path):
    before = paths(pictures(folders(tmp_path)), "test")
    folders(tmp_path, domains=["dusk"])
    assert before < paths(pictures(tmp_path), "test")


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_splits_on_disk_are_used(tmp_path, held_out):
    folders(tmp_path, split="train", count=3)
    folders(tmp_path, split=held_out, count=1)
    data = pictures(tmp_path)
    assert {p.parts[-3] for p in paths(data, "train")} == {"train"}
    assert {p.parts[-3] for p in paths(data, "test")} == {held_out}


def test_layout_of_office_31_and_deeper_folders(tmp_path):
    folders(tmp_path, split="images")
    draw(tmp_path / "day/images/cat/more/deep.JPG", 50)
    draw(tmp_path / "day/images/.hidden/x.png")
    draw(tmp_path / "day/images/cat/._x.png")
    (tmp_path / "day/images/cat/notes.txt").write_text("no picture")
    assert len(scan(tmp_path, "day")) == 11


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp"])
def test_formats(tmp_path, suffix):
    draw(tmp_path / f"x.{suffix}")
    assert read_picture(tmp_path / f"x.{suffix}", 16).shape == (3, 16, 16)


def test_modes_become_rgb(tmp_path):
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp * 255).astype(np.uint8)).save(tmp_path / "8.png")
    deep, plain = read_picture(tmp_path / "16.png", 16), read_picture(tmp_path / "8.png", 16)
    assert (deep.int() - plain.int()).abs().max() <= 2
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", 8) == 255).all()
    Image.new("RGB", (8, 8), "red").quantize(4).save(tmp_path / "p.png", transparency=b"\x80\xff")
    assert read_picture(tmp_path / "p.png", 8).shape == (3, 8, 8)


def test_unreadable_pictures_are_listed_and_left_out(tmp_path):
    folders(tmp_path)
    whole = (tmp_path / "day/cat/0.png").read_bytes()
    (tmp_path / "day/cat/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "night/dog/text.jpg").write_text("no picture")
    (tmp_path / "night/dog/empty.png").touch()
    data = pictures(tmp_path)
    assert [p for p, _ in data.skipped] == [
        "day/cat/cut.png", "night/dog/empty.png", "night/dog/text.jpg",
    ]  # fmt: skip
    assert all("cannot be read" in why for _, why in data.skipped)
    assert len(data.items) == 20
    for batch in data.on(train=["day", "night"]).train_dataloader():
        assert batch[0].shape[1:] == (3, 28, 28)


def test_links_are_followed_and_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "all", folders(tmp_path / "elsewhere")
    root.mkdir()
    for name, to in (("day", elsewhere / "day"), ("loop", root), ("gone.png", tmp_path / "gone")):
        (root / name).symlink_to(to)
    (root / "shut").mkdir()
    os.mkfifo(root / "pipe.png")
    scan = os.scandir

    def scandir(path):
        if path == str(root / "shut"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = pictures_below(root)
    day = sorted(p.relative_to(elsewhere) for p in (elsewhere / "day").rglob("*.png"))
    assert [p.relative_to(root) for p in found] == [*day, Path("gone.png"), Path("pipe.png")]
    assert other_files(root) == [(root / "shut", "Permission denied: its files are not read")]
    for name in ("gone.png", "pipe.png"):
        with pytest.raises(DataError, match=r"No such file|a pipe"):
            read_picture(root / name, 8)
    with pytest.raises(DataError, match="shut: Permission denied"):
        load_utterances(root)


def test_pictures_are_the_same_with_and_without_memory(tmp_path):
    folders(tmp_path)
    held, read = pictures(tmp_path), pictures(tmp_path, cache_mb=0)
    a, b = (torch.cat([x for x, _ in d.predict_dataloader()]) for d in (held, read))
    assert torch.equal(a, b)
    assert not read._pictures


def test_the_seed_decides_on_order_and_augmentation(tmp_path):
    data = pictures(folders(tmp_path))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(torch.cat([x for x, _ in data.train_dataloader()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_batch_is_its_pictures_one_by_one(tmp_path):
    dataset = pictures(folders(tmp_path)).unlabelled(augmented=True, jitter=0.4)
    chosen = [2, 0, 1]
    torch.manual_seed(0)
    found, indices = zip(*Target(dataset).__getitems__(chosen), strict=True)
    torch.manual_seed(0)
    alone = [dataset.transform(dataset.pictures[dataset.items[i].path]) for i in chosen]
    assert torch.equal(torch.stack(found), torch.stack(alone))
    assert list(indices) == chosen


def test_loaders_keep_to_domain_and_split(tmp_path):
    data = pictures(folders(tmp_path)).on(train=["night"], test=["night", "day"])
    assert [i.domain for i in data.held_out()] == ["night"] * 4 + ["day"] * 4
    assert sum(len(y) for _, y in data.train_dataloader()) == 6
    assert sum(len(y) for _, y in data.unlabelled_dataloader()) == 6
    items = data.held_out()
    labels = torch.cat([y for _, y in data.predict_dataloader()])
    assert [data.classes[y] for y in labels] == [i.class_name for i in items]


def test_normalisation(tmp_path):
    folders(tmp_path)
    data = pictures(tmp_path, mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))
    x, _ = next(iter(data.predict_dataloader()))
    stored = data._pictures[data.held_out()[0].path]
    assert torch.allclose(x[0], stored[:, 2:30, 2:30] / 255 / 0.5, atol=1e-6)


def test_no_batch_of_one(tmp_path):
    data = pictures(folders(tmp_path, count=12), test_fraction=0.25)
    data.batch_size = 17  # of 18
    assert [len(y) for _, y in data.train_dataloader()] == [17]


def test_missing_root_names_what_there_is(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataNotFoundError, match=r"no folder .*phots; .* holds: photos"):
        pictures(tmp_path / "phots")
    with pytest.raises(DataNotFoundError, match="holds no folders"):
        pictures(tmp_path / "photos")


def test_missing_domain_names_what_there_is(tmp_path):
    folders(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"no domain 'dusk' under .* holds: day, night"):
        pictures(tmp_path, target=["dusk"])
    with pytest.raises(DataNotFoundError, match="no domain 'daylight'"):
        ImageDomains(tmp_path, "daylight").setup()
    assert find_domains(tmp_path, ["night", "night"]) == ["night"]


def test_source_alone(tmp_path):
    with pytest.raises(DataError, match="no target domain beside the source 'day'"):
        pictures(folders(tmp_path, domains=["day"]))


def test_class_in_one_domain_only(tmp_path):
    folders(tmp_path)
    folders(tmp_path, domains=["day"], classes=["fox"])
    with pytest.raises(DataError, match=r"'fox' is not in night\n.*data\.classes=\[cat,dog\]"):
        pictures(tmp_path)
    assert pictures(tmp_path, classes=["cat", "dog"]).classes == ["cat", "dog"]
    with pytest.raises(DataError, match="'owl' is not in day, night"):
        pictures(tmp_path, classes=["cat", "dog", "owl"])


def test_one_class(tmp_path):
    with pytest.raises(DataError, match="at least two classes"):
        pictures(folders(tmp_path, classes=["cat"]))


def test_empty_domain(tmp_path):
    folders(tmp_path)
    (tmp_path / "dusk/cat").mkdir(parents=True)
    with pytest.raises(DataError, match="domain 'dusk' is empty"):
        pictures(tmp_path)


def test_domain_without_a_readable_picture(tmp_path):
    folders(tmp_path)
    for picture in (tmp_path / "night").rglob("*.png"):
        picture.write_text("broken")
    with pytest.raises(DataError, match="'night': no picture can be read"):
        pictures(tmp_path)


def test_class_of_one_picture(tmp_path):
    folders(tmp_path)
    for i in range(1, 5):
        (tmp_path / f"night/dog/{i}.png").unlink()
    with pytest.raises(DataError, match="class 'dog' of domain 'night' has one readable picture"):
        pictures(tmp_path)


def test_class_missing_from_a_split_on_disk(tmp_path):
    folders(tmp_path, split="train")
    folders(tmp_path, split="test", classes=["cat"])
    folders(tmp_path, domains=["day"], split="test", classes=["dog"])
    with pytest.raises(
        DataError, match="'dog' of domain 'night' has no readable picture in 'test'"
    ):
        pictures(tmp_path)


def test_fraction_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match=r"test_fraction must lie in \(0, 1\), got 1"):
        ImageDomains(tmp_path, test_fraction=1)
