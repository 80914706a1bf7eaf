"""Adapters go to a hub and come back, by the real client, from a server on this machine."""

import copy
import json

import pytest
import timm
import torch

from lora_lightning import inject, load_adapter, push_adapter
from lora_lightning.cli import main
from lora_lightning.deploy import export
from lora_lightning.errors import AdapterFileError
from tests.helpers.hub import local_hub
from tests.helpers.training import randomise

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with local_hub() as (address, held):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield held


@pytest.fixture
def models():
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    names = ("cat", "a|b <i>", "dog")
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    base = copy.deepcopy(model)
    inject(model, rank=2)
    randomise(model)
    return base, model


def test_an_adapter_goes_to_a_hub_and_comes_back(hub, models, tmp_path, capsys):
    base, model = models
    address = push_adapter(model, "me/night", results={"accuracy, night": 0.87654}, token="t")
    assert address.endswith("/me/night/commit/" + 40 * "a")
    assert sorted(hub["me/night"]) == ["README.md", "adapter.safetensors"]
    page = hub["me/night"]["README.md"].decode()
    front = dict(line.split(": ", 1) for line in page.split("---\n")[1].splitlines())
    assert json.loads(front["pipeline_tag"]) == "image-classification"
    for text in (
        "test\\_vit", "cat, a\\|b \\<i\\>, dog", "accuracy, night | 0.8765", "rank | 2 |",
        'load_adapter(model, "hf://me/night")',
    ):  # fmt: skip
        assert text in page
    load_adapter(base, "hf://me/night")
    assert torch.equal(base(X), model(X))
    assert main(["inspect", "hf://me/night"]) == 0
    assert "blocks.0.attn.qkv.weight" in capsys.readouterr().out


def test_one_of_peft_is_read(hub, models, tmp_path):
    base, model = models
    export(model, tmp_path / "peft", "peft")
    hub["they/theirs"] = {p.name: p.read_bytes() for p in (tmp_path / "peft").iterdir()}
    load_adapter(base, "hf://they/theirs@main")
    assert torch.equal(base(X), model(X))


def test_what_a_hub_refuses_is_said(hub, models, monkeypatch):
    base, model = models
    hub["me/empty"] = {"README.md": b""}
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        load_adapter(base, "hf://me/empty")
    with pytest.raises(AdapterFileError, match="hf://me/none could not be fetched"):
        load_adapter(base, "hf://me/none")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterFileError, match="me/night could not be pushed"):
        push_adapter(model, "me/night", token="t")
