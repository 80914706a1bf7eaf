"""Adapter files: saving and loading, and all kinds of invalid files."""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import shutil
import signal
import socket
import tracemalloc
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lora_lightning
from lora_lightning import (
    disabled,
    inject,
    load_adapter,
    merge,
    read_header,
    remove,
    save_adapter,
    set_active,
)
from lora_lightning.cli import main
from lora_lightning.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFileError,
    AdapterNotFoundError,
    BaseMismatchError,
    ConfigError,
    TargetError,
)
from lora_lightning.model.adapter_file.format import read, write
from tests.helpers.files import rewrite
from tests.helpers.interrupt import everything, same
from tests.helpers.training import randomise, tiny_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A base, the file of an adapter of it with a trained head, the adapted model, its output."""
    torch.manual_seed(0)
    base = tiny_vit()
    model = copy.deepcopy(base)
    inject(model, rank=2, seed=0, target_modules=["auto", "pos_embed"], name="alice")
    randomise(model)
    with torch.no_grad():
        model.head.weight.add_(0.1)
    path = save_adapter(model, tmp_path_factory.mktemp("original") / "deep/alice.safetensors")
    return base, path, model, model(X).detach()


@pytest.fixture
def base(original) -> nn.Module:
    return copy.deepcopy(original[0])


@pytest.fixture
def path(original, tmp_path) -> Path:
    """The file, to be changed."""
    (tmp_path / "deep").mkdir()
    return Path(shutil.copy(original[1], tmp_path / "deep"))


@pytest.fixture
def trained(original, path):
    """The adapted model, to be changed, its file, and its output."""
    return copy.deepcopy(original[2]), path, original[3]


def test_a_checkout_that_is_not_installed_saves(trained, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("lora_lightning.report.versions.version", missing)
    path = save_adapter(trained[0], tmp_path / "a.safetensors")
    assert read_header(path)["versions"]["lora_lightning"] == "unknown"
    assert lora_lightning.__version__ == "unknown"
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "lora-lightning unknown\n"


def untouched(model: nn.Module, base: nn.Module) -> bool:
    return list(model.state_dict()) == list(base.state_dict()) and torch.equal(model(X), base(X))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"freeze_a": True, "dropout": 0.1}])
def test_there_and_back(base, tmp_path, options):
    model = copy.deepcopy(base)
    inject(model, rank=2, scaling="alpha/sqrt(r)", trainable=["head", "norms"], **options)
    randomise(model)
    with torch.no_grad():
        model.norm.weight.mul_(1.1)
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = copy.deepcopy(base)
    report = load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(X), model(X))
    assert report.trainable_parameters == sum(
        p.numel() for p in fresh.parameters() if p.requires_grad
    )
    with disabled(fresh):
        assert torch.equal(fresh(X), base(X))
    remove(fresh)
    assert untouched(fresh, base)


def test_header_says_what_it_is(trained):
    header = read_header(trained[1])
    assert header["format_version"] == 1
    assert header["name"] == "alice"
    assert header["base"]["architecture"] == "test_vit"
    assert header["config"]["rank"] == 2
    assert header["extras"] == ["head.weight", "head.bias"]
    assert header["versions"].keys() == {"lora_lightning", "python", "torch"}
    assert {t["module"] for t in header["targets"]} >= {"", "blocks.0.attn.qkv"}
    assert header["data"]["input_size"] == [3, *trained[0].patch_embed.img_size]
    assert "class_names" not in header["data"]


def test_class_names_are_written_where_there_is_one_for_each_class(base, tmp_path):
    whole = ("b\x1b", "猫", *"cdefghij")[: base.num_classes]
    for names, written in ((whole, ["b\\x1b", *whole[1:]]), (whole[1:], None)):
        model = copy.deepcopy(base)
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
        inject(model, rank=1)
        save_adapter(model, tmp_path / "a.safetensors")
        assert read_header(tmp_path / "a.safetensors")["data"].get("class_names") == written


def test_a_merged_model_saves_the_same_file(trained, tmp_path):
    model, path, _ = trained
    merge(model)
    again = save_adapter(model, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_an_inactive_adapter_saves_the_same_file(trained, tmp_path):
    model, path, _ = trained
    inject(model, rank=1, name="bob", seed=0)
    with torch.no_grad():
        model.head.weight.add_(5)
    again = save_adapter(model, tmp_path / "again.safetensors", "alice")
    assert again.read_bytes() == path.read_bytes()
    set_active(model, None)
    with pytest.raises(AdapterNotFoundError, match="to save"):
        save_adapter(model, tmp_path / "none.safetensors")


def test_another_name_and_names_that_are_taken(trained, base):
    _, path, output = trained
    model = copy.deepcopy(base)
    load_adapter(model, path, name="one")
    load_adapter(model, path, name="two")
    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        load_adapter(model, path, name="one")
    load_adapter(model, path, name="one", overwrite=True)
    assert torch.equal(model(X), output)


def test_a_classifier_reset_after_injection_is_in_the_file(base, tmp_path):
    model = copy.deepcopy(base)
    inject(model, rank=2, seed=0)
    model.reset_classifier(7)
    with torch.no_grad():
        model.head.weight.normal_()
    path = save_adapter(model, tmp_path / "a.safetensors")
    fresh = copy.deepcopy(base)
    fresh.reset_classifier(7)
    load_adapter(fresh, path)
    assert torch.equal(fresh(X), model(X))


def test_wrong_architecture(trained):
    other = timm.create_model("test_vit2", num_classes=4)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(BaseMismatchError, match="was made for test_vit, and this model is test_v"):
        load_adapter(other, trained[1])
    assert list(other.state_dict()) == list(before)


def test_same_architecture_other_weights(trained):
    torch.manual_seed(1)
    other = tiny_vit()
    twin = copy.deepcopy(other)
    with pytest.raises(BaseMismatchError, match="with other weights"):
        load_adapter(other, trained[1])
    assert untouched(other, twin)
    load_adapter(other, trained[1], check="structure")
    with pytest.raises(ConfigError, match="check must be"):
        load_adapter(other, trained[1], check="none")


def test_other_number_of_classes(trained, base):
    other = copy.deepcopy(base)
    other.reset_classifier(9)
    with pytest.raises(AdapterFileError, match=r"head\.\w+ has shape .* same number of classes"):
        load_adapter(other, trained[1])


def test_half_precision_base_still_counts_as_the_same(trained, base):
    load_adapter(copy.deepcopy(base).bfloat16(), trained[1])


DAMAGE = {
    "missing tensor": (lambda t, h: t.pop("blocks.0.attn.qkv.weight.lora_A"), "missing tensors"),
    "extra tensor": (lambda t, h: t.update(more=torch.ones(1)), r"unexpected tensors \['more'\]"),
    "misshapen": (
        lambda t, h: t.update({"blocks.0.attn.qkv.weight.lora_B": torch.ones(3, 2)}),
        "has shape",
    ),
    "header without targets": (lambda t, h: h.pop("targets"), "lacks or garbles targets"),
    "target without rank": (lambda t, h: h["targets"][0].pop("rank"), r"targets\[0\]\.rank"),
    "newer format": (lambda t, h: h.update(format_version=99), "upgrade lora-lightning"),
    "unknown extra": (lambda t, h: h["extras"].append("nose"), "BaseMismatch|no place"),
    "bad config": (lambda t, h: h["config"].update(rank=-1), "rank must be"),
    "unknown config key": (lambda t, h: h["config"].update(rnk=1), "unknown key 'rnk'"),
    "NaN": (
        lambda t, h: t["blocks.0.attn.qkv.weight.lora_B"].fill_(math.nan),
        r"qkv\.weight\.lora_B holds NaN or infinity, as 1 of its",
    ),
    "infinite head": (lambda t, h: t["head.bias"].fill_(math.inf), r"head\.bias holds NaN"),
    "float8": (
        lambda t, h: t.update({"head.bias": t["head.bias"].to(torch.float8_e4m3fn)}),
        r"numbers of type torch\.float8_e4m3fn, and here torch\.float32",
    ),
    "whole numbers": (lambda t, h: t.update({"head.bias": t["head.bias"].int()}), "torch.int32"),
    "20,000 targets": (lambda t, h: h.update(targets=h["targets"][:1] * 20_000), "targets twice"),
    "200,000 targets": (lambda t, h: h.update(targets=[1] * 200_000), r"at most 20000, got a list"),
    "extras twice": (lambda t, h: h.update(extras=h["extras"] * 2), "tensors twice"),
    "a parameter among buffers": (
        lambda t, h: (h["extras"].remove("head.bias"), h["buffers"].append("head.bias")),
        "BaseMismatch|has no place|other parameters",
    ),
    "more in full than is trainable": (
        lambda t, h: h["config"].update(trainable=["head.weight"]),
        r"the difference: \['head\.bias'\]",
    ),
    "no object": (lambda t, h: h.update(config=[]), r"config \(expected a mapping, got a list"),
}
LISTS = (["\ud800"], ["\x1b[31m"], math.nan, [[[[[]]]]], {"a": "\x00"})
GARBLED = {  # part of the header → key → values that cannot be
    "targets[0].": {
        "scaling": (math.nan, math.inf, "2", [2.0], None, 1e20, -1.0, 0, True),
        "alpha": (0.0, 1e20, {}), "rank": (0, 2.0, True, 2**40, "2"),
        "dropout": (1.0, -0.1, math.nan), "dora": (1, "true"), "xs": (0, None),
        "basis": ("x", math.nan), "module": (3, "a\x1b[31m", "m" * 2000, "\ud800"),
        "shape": ([[3]] * 9, "3x3"), "matrix": ([3], [3, 3, 3]), "kind": (None, "a\nb"),
    },
    "": {"name": ("", "x" * 1001, 7, "\x00"), "versions": ([], None), "extras": ({}, "head.bias"),
         "format_version": (True, 1.0, 0, "1")},
    "data.": {"class_names": ("cat", {}), "input_size": ([3, 32], 224), "mean": ("x", None),
              "interpolation": (7, ""), "crop_pct": (0, math.inf)},
    "config.": {"target_modules": LISTS, "new": LISTS},
    "base.": {"structure": ({}, ["a"], 1, None), "weights": ({}, ["a"], 1, None)},
}  # fmt: skip


def garble(header, part, key, value):
    held = header["targets"][0] if "targets" in part else header[part[:-1]] if part else header
    held[key] = value


DAMAGE |= {
    f"{part}{key}={value!r:.20}": (
        lambda t, h, where=(part, key, value): garble(h, *where),
        rf"garbles {re.escape(part + key)} \(expected",
    )
    for part, keys in GARBLED.items()
    for key, values in keys.items()
    for value in values
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damaged_contents_leave_the_model_alone(original, path, damage):
    change, message = DAMAGE[damage]
    rewrite(path, change)
    model = original[0]
    before = everything(model)
    with pytest.raises((AdapterFileError, ConfigError), match=message):
        load_adapter(model, path)
    assert same(everything(model), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_written(trained, tmp_path, value):
    model, path, _ = trained
    before, names = path.read_bytes(), sorted(tmp_path.iterdir())
    with torch.no_grad():
        model.blocks[0].attn.qkv.lora["alice"]["weight"].lora_B[0, 0] = value
    for given in (path, tmp_path / "new"):
        with pytest.raises(AdapterError, match=r"holds NaN or infinity .* was not written"):
            save_adapter(model, given)
    assert sorted(tmp_path.iterdir()) == names
    assert path.read_bytes() == before


@pytest.mark.parametrize("trainable", [["nothing"], ["re:("], ["type:Nothing"], ["re:"]])
def test_what_a_file_cannot_train_leaves_the_model_alone(trained, base, trainable):
    rewrite(trained[1], lambda t, h: h["config"].update(trainable=trainable))
    model = copy.deepcopy(base)
    load_adapter(model, save_adapter(trained[0], trained[1].with_name("b")), name="b")
    before = everything(model)
    with pytest.raises((AdapterFileError, TargetError, ConfigError)):
        load_adapter(model, trained[1])
    assert same(everything(model), before)


def test_no_flipped_bit_is_accepted(trained, base):
    """Wherever it is: in names, sizes, settings, numbers. A few of them change nothing."""
    data, output = trained[1].read_bytes(), trained[2]
    begin = 8 + int.from_bytes(data[:8], "little")
    draw = torch.Generator().manual_seed(0)
    places = [*range(begin, len(data), len(data) // 40), *range(0, begin, begin // 80)]
    for place in places:
        bit = 1 << int(torch.randint(8, (), generator=draw))
        flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        trained[1].write_bytes(flipped)
        try:
            load_adapter(base, trained[1], "x")
        except AdapterFileError:
            continue
        assert place < begin
        assert torch.equal(base(X), output), place
        remove(base)


def test_files_of_before_the_checksum_load(trained, base):
    rewrite(trained[1], lambda t, h: h.pop("checksum"))
    load_adapter(base, trained[1])
    assert torch.equal(base(X), trained[2])


def test_a_header_is_covered_by_the_checksum(trained, base):
    rewrite(trained[1], lambda t, h: h["targets"][0].update(scaling=3.0), sign=False)
    with pytest.raises(AdapterFileError, match="its checksum is not that of its contents"):
        load_adapter(base, trained[1])
    with pytest.raises(AdapterFileError, match="its checksum is not that of its contents"):
        read_header(trained[1])


HUGE = {
    "a long header": lambda size: size.to_bytes(8, "little") + b"{" + b" " * 9,
    "a long header, all of it": lambda size: size.to_bytes(8, "little") + b"{" + b"[" * size,
    "nested": lambda size: (10**6).to_bytes(8, "little") + b'{"a":' + b"[" * 10**6,
}


@pytest.mark.parametrize("kind", HUGE)
def test_limits_come_before_parsing(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HUGE[kind](90_000_000))
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="damaged or no safetensors"):
        read_header(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6


def test_a_header_too_long_to_be_read_is_not_written(tmp_path):
    with pytest.raises(AdapterFileError, match=r"a was not written: .* longer than 16,000,000"):
        write(tmp_path / "a", {"a": torch.zeros(1)}, {"note": "x" * 16_000_000})
    assert not (tmp_path / "a").exists()


def test_what_is_no_file_is_refused_at_once(tmp_path, base):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind(str(tmp_path / "s"))
    for path, what in (
        (tmp_path / "pipe", "is a pipe"),
        (tmp_path / "s", "is a socket"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path, "is a folder"),
        (tmp_path / "no.safetensors", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / "a\0b", "does not exist"),
    ):
        for call in (read_header, lambda path: load_adapter(base, path)):
            with pytest.raises(AdapterFileError, match=what):
                call(path)


def test_a_file_cut_short_after_it_was_read_ends_no_process(trained):
    """As `cp` does that renews it in place: what is mapped would raise SIGBUS."""
    tensors = read(trained[1])[1]
    sums = [float(t.double().sum()) for t in tensors.values()]
    os.truncate(trained[1], 0)
    assert [float(t.double().sum()) for t in tensors.values()] == sums


def test_another_adapters_head_is_no_part_of_the_base(base, tmp_path):
    """Saved or loaded beside an active adapter with a trained head."""
    model = copy.deepcopy(base)
    inject(model, rank=2, name="a")
    inject(model, rank=2, name="b", trainable=[])
    set_active(model, "a")
    with torch.no_grad():
        model.head.weight.add_(1)
    path = save_adapter(model, tmp_path / "b.safetensors", "b")
    load_adapter(copy.deepcopy(base), path)
    load_adapter(model, path, name="again")


def test_a_bad_file_does_not_cost_the_adapter_that_it_would_replace(trained):
    model, path, output = trained
    rewrite(path, lambda t, h: h["config"].update(rnk=1))
    with pytest.raises(AdapterFileError, match="configuration is wrong"):
        load_adapter(model, path, name="alice", overwrite=True)
    assert torch.equal(model(X), output)


def test_files_are_as_readable_as_any_other(trained, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert trained[1].stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("length", [0, 4, 100, 3000])
def test_truncated_file(trained, base, length):
    data = trained[1].read_bytes()
    trained[1].write_bytes(data[:length] if length < 3000 else data[:-7])
    with pytest.raises(AdapterFileError, match="damaged or no safetensors"):
        load_adapter(copy.deepcopy(base), trained[1])


def test_pickle_in_disguise(tmp_path, base):
    path = tmp_path / "evil.safetensors"
    torch.save({"a": 1}, path)
    with pytest.raises(AdapterFileError, match="is a pickle"):
        load_adapter(base, path)
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterFileError, match="is a pickle"):
        load_adapter(base, path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_whose_length_looks_like_a_pickle(trained, base, protocol):
    """Its first bytes are a number, which may be any."""
    rewrite(trained[1], lambda t, h: h.update(note=""))
    size = int.from_bytes(trained[1].read_bytes()[:8], "little")
    wanted = next(n for n in range(size, 2**20) if n % 2**16 == 128 + 256 * protocol)
    rewrite(trained[1], lambda t, h: h.update(note="x" * (wanted - size)))
    assert trained[1].read_bytes().startswith(bytes([128, protocol]))
    load_adapter(copy.deepcopy(base), trained[1])


def test_a_base_checkpoint_is_no_adapter(tmp_path, base):
    path = tmp_path / "base.safetensors"
    save_file(base.state_dict(), str(path))
    with pytest.raises(AdapterFileError, match="holds no adapter of ours"):
        load_adapter(base, path)


def test_a_changed_base_is_said(base, tmp_path):
    model = copy.deepcopy(base)
    inject(model, rank=2, freeze=False)
    with torch.no_grad(), disabled(model):
        model.blocks[0].attn.qkv.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="the base's weights changed since"):
        save_adapter(model, tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_killed_write_leaves_the_old_file(tmp_path):
    """A process killed while it writes: the old file is whole, whenever the kill came."""
    path, real = tmp_path / "a.safetensors", os.fsync
    write(path, {"a": torch.zeros(4)}, {})
    if not (process := os.fork()):
        os.fsync = lambda handle: (real(handle), os.kill(os.getpid(), signal.SIGKILL))
        write(path, {"a": torch.ones(4)}, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    with safe_open(str(path), framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.zeros(4))


def test_a_failing_write_leaves_no_litter(tmp_path, trained, monkeypatch):
    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    before = sorted(trained[1].parent.iterdir())
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained[0], trained[1])
    assert sorted(trained[1].parent.iterdir()) == before


@pytest.mark.parametrize(
    ("files", "recognisers"), [(12, 4), pytest.param(600, 60, marks=pytest.mark.slow)]
)
def test_mutated_files_through_all_that_reads_them(files, recognisers, tmp_path, monkeypatch):
    """`benchmarks/fuzz.py`, on fewer files: see there for what is counted."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    fuzz = importlib.import_module("fuzz").run(files, recognisers, 7, tmp_path)
    assert not fuzz.faults, fuzz.faults[:9]
    assert fuzz.counts["calls"] > 3 * files
    assert fuzz.slowest[0] < 5, fuzz.slowest
    assert fuzz.memory < 1000
