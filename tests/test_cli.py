"""The command line: what it prints, what it writes, how it fails."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from omegaconf.errors import MissingMandatoryValue
from safetensors.torch import load_file, save_file

from lora_lightning import inject, merge, read_header, save_adapter
from lora_lightning.cli import main
from lora_lightning.model.adapter_file.format import read, write
from lora_lightning.report.console import visible
from tests.helpers.miniature import TINY, photos
from tests.helpers.training import randomise


@pytest.fixture
def adapter(tmp_path):
    """An adapter file, its base's checkpoint, and the adapted model."""
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    inject(model, rank=2)
    randomise(model)
    return save_adapter(model, tmp_path / "adapter.safetensors"), model


@pytest.mark.usefixtures("undrawn")
def test_run_prints_the_table_and_where_the_results_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    root = photos(tmp_path / "photos")
    own = [f"data.root={root}", "data.source=day", f"out={tmp_path / 'out'}"]
    own += ["methods=[source_only,nearest_centroid,label_free,lora]"]
    assert main(["run", "lighting", "--quick", *TINY, *own]) == 0
    out, err = capsys.readouterr()
    assert "LoRA" in out
    assert "(quick)" in out
    page = (tmp_path / "out/report.html").read_text()
    assert "its figures are rougher" in page
    assert "run lighting --quick model.name" in page
    assert "report.html" in out
    assert (tmp_path / "out/results.json").is_file()
    assert "training the source model" in err
    assert "Trainer" not in out + err  # none of Lightning's own chatter
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)


def test_sweep_compares_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    root = photos(tmp_path / "photos")
    own = [f"data.root={root}", "data.source=day", f"out={tmp_path / 'out'}", "lora.rank=2"]
    assert main(["sweep", "lighting", *TINY, *own, "--ranks", "1", "64", "explained-variance"]) == 0
    out = capsys.readouterr().out
    assert "rank 64" in out
    assert (tmp_path / "out/plots/ranks.svg").is_file()
    rows = json.loads((tmp_path / "out/results.json").read_text())
    ranked = [
        (r["method"].split(", ")[1], r["trainable_parameters"]) for r in rows if "," in r["method"]
    ]
    size = dict(ranked)
    assert size["rank 1"] < size["rank explained-variance"] < size["rank 64"]
    targets = read_header(tmp_path / "out/adapter_rank_64.safetensors")["targets"]
    # First steps as large as the recipe's: its scaling is 4 (alpha 8) at rank 2.
    assert all(t["scaling"] == pytest.approx(4 * (2 / t["rank"]) ** 0.5) for t in targets)
    assert max(t["rank"] for t in targets) == 64 > min(t["rank"] for t in targets)
    assert main(["sweep", "lighting", *own, "--ranks", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "lighting", *own, "--ranks", "some"])
    assert "invalid" in capsys.readouterr().err


def test_help_of_a_recipe_lists_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["run", "lighting", "--help"]) == 0
    out = capsys.readouterr().out
    for text in ("lora.rank=", "data.root=null", "inner dimension", "data.horizontal_flip=true"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_without_a_recipe_lists_the_recipes(capsys):
    assert main(["run", "--help"]) == 0
    assert "lighting" in capsys.readouterr().out


def test_list(capsys):
    assert main(["list"]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    recipes = [
        "acoustics",
        "environment",
        "lighting",
        "pose",
        "speaker",
        "translation",
        "viewpoint",
    ]
    assert [name for name, _ in listed] == recipes
    assert listed[2][1].strip() == "Objects in another light"


def test_copy_gives_a_recipe_that_runs_from_there(tmp_path, capsys):
    assert main(["copy", "lighting", str(tmp_path)]) == 0
    assert {p.name for p in (tmp_path / "lighting").iterdir()} == {"recipe.yaml", "README.md"}
    assert f"lora-lightning run {tmp_path / 'lighting'}" in capsys.readouterr().out
    assert main(["run", str(tmp_path / "lighting"), "--help"]) == 0
    assert main(["copy", "lighting", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_inspect(adapter, capsys):
    path, _ = adapter
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for text in ("test_vit", "rank=2", "blocks.0.attn.qkv.weight", "head.weight"):
        assert text in out


def test_merge_writes_a_model_that_needs_nothing_of_ours(adapter, tmp_path, capsys):
    path, model = adapter
    base, out = str(tmp_path / "base.safetensors"), tmp_path / "new/merged.safetensors"
    common = ["merge", "--model", "test_vit", "--checkpoint", base, "--adapter", str(path)]
    assert main([*common, "--out", str(out)]) == 0
    assert "3 classes" in capsys.readouterr().out
    plain = timm.create_model("test_vit", num_classes=3).eval()
    plain.load_state_dict(load_file(out))
    x = torch.randn(2, 3, 160, 160)
    merge(model)
    assert torch.equal(plain(x), model(x))
    (tmp_path / "plain").touch()  # as readable as any other file
    assert {p.stat().st_mode for p in (out, path)} == {(tmp_path / "plain").stat().st_mode}
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "of a whole model" in shown
    assert "160 × 160 pixels" in shown


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export(adapter, tmp_path, capsys):
    path, model = adapter
    base, out = str(tmp_path / "base.safetensors"), tmp_path / "new/timm"
    common = ["--model", "test_vit", "--checkpoint", base, str(path), "--out", str(out)]
    assert main(["export", "--format", "timm", *common]) == 0
    assert "outputs of batches of 1, 2, 7 differ by at most 0.0e+00" in capsys.readouterr().out
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    merge(model)
    assert torch.equal(plain(x), model(x))
    assert main(["export", "--format", "onxx", *common]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err


def test_merge_with_another_base(adapter, tmp_path, capsys):
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "o.safetensors")
    arguments = ["--adapter", str(adapter[0]), "--out", str(tmp_path / "m.safetensors")]
    arguments += ["--model", "test_vit", "--checkpoint", str(tmp_path / "o.safetensors")]
    assert main(["merge", *arguments]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "lightin"], "there is no recipe 'lightin'; did you mean 'lighting'?"),
        (["run", "lighting", "lora.rnk=3"], "unknown key 'lora.rnk'; did you mean 'lora.rank'"),
        (["run", "lighting", "data.root=/nowhere/at/all", "out=OUT"], "there is no folder"),
        (
            ["sweep", "lighting", "lora.rank=1,2", "--ranks", "1"],
            "either --ranks, or lora.rank=1,2",
        ),
        (["sweep", "lighting", "--by", "target"], "--by chooses among settings"),
        (["inspect", "nothing.safetensors"], "does not exist"),
        (["copy", "lightin", "."], "there is no recipe"),
        (["run", "lighting", "lora.alpha=[1]"], "lora.alpha must be one value, such as 8.0"),
        (["run", "lighting", "data.size=[112]"], "data.size must be one value, such as 112"),
        (["run", "lighting", "accelerator=cpu", f"out=OUT/{300 * 'x'}"], "give a shorter one"),
        (["run", "lighting", "accelerator=cpu", "out=OUT/file/x"], "a part of the path is a file"),
        (["run", "lighting", 'accelerator="[/]"'], "[/] cannot be used here"),
        (["copy", "lighting", "OUT/file"], "a part of the path is a file"),
        (["run", "lighting", "accelerator=cpu", 'out="a\\0b"'], "a path holds a NUL character"),
        (["run", "lighting", "accelerator=cpu", "data.root=OUT/loop", "out=OUT/o"], "no folder"),
        (["run", "lighting", f"lora.alpha={5000 * '9'}"], "the value is no valid YAML"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(arguments, message, capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    arguments = [a.replace("OUT", str(tmp_path)) for a in arguments]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "error: " in err
    assert message in err
    assert "Traceback" not in err


def singular() -> None:
    torch.linalg.cholesky(-torch.eye(2))


def at_path(number: int, path: str | None = "/a/[/]b\x1b[2J") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (at_path(errno.EACCES), r"/a/[/]b\x1b[2J: Permission denied; change its permissions"),
        (at_path(errno.EROFS), "Read-only file system; give a folder that can be written to"),
        (at_path(errno.ENOSPC, None), "error: No space left on device; free some space"),
        (at_path(errno.EDQUOT), "free some space"),
        (at_path(errno.EIO), "Input/output error"),
        (OSError("the hub\ndoes not answer"), "error: the hub does not answer"),
        (MemoryError(), "smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory"), "smaller batches"),
        (np.linalg.LinAlgError("no convergence"), "cannot be decomposed (no convergence)"),
        (singular, "cannot be decomposed (linalg.cholesky"),
        (MissingMandatoryValue("Missing value: out"), "a setting cannot be used: Missing value"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_whatever_a_system_refuses_is_one_sentence(error, message, capsys, monkeypatch):
    def fail(_: object) -> None:
        error() if callable(error) else None
        raise error

    monkeypatch.setattr("lora_lightning.runner.cli._list", fail)
    assert main(["list"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_pipe_that_is_closed_ends_the_command(monkeypatch, capsys):
    """Not as if it were done; and what is still to be printed goes nowhere."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    assert main(["list"]) == 141
    sys.stdout.close()  # says nothing


def test_a_full_disk_is_told_of_what_is_printed(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["list"]) == 2
        assert "No space left on device" in capsys.readouterr().err  # and closing says nothing


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("lora_lightning.runner.cli._list", lambda _: {}["fault"])
    with pytest.raises(KeyError):
        main(["list"])


def test_names_are_shown_not_interpreted(adapter, tmp_path, capsys):
    header, tensors = read(adapter[0])
    header["base"]["architecture"] = header["targets"][0]["path"] = "[/][red]:cat:"
    path = write(tmp_path / "\x1b[2J[/]\u202e.safetensors", tensors, header)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(out)
    assert r"\x1b[2J[/]\u202e.safetensors" in "".join(out.split())
    assert out.count("[/][red]:cat:") == 2
    assert main(["copy", "lighting", str(tmp_path / "[" / "]" / ":cat:")]) == 0
    assert "/[/]/:cat:/" in capsys.readouterr().out
    assert visible("José 李明\t\n") == "José 李明\t\n"


def test_ctrl_c_in_training_ends_the_run(tmp_path, capsys, monkeypatch):
    from lora_lightning.vision.classifier import Classifier

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "training_step", stop)
    own = [f"data.root={photos(tmp_path / 'p')}", "data.source=day", f"out={tmp_path / 'out'}"]
    assert main(["run", "lighting", *TINY, *own]) == 130
    assert "stopped" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys; from lora_lightning.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'lightning', 'timm', 'omegaconf'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lora-lightning run lighting" in done.stdout
