"""The base of an adapter file: its parameters, and its buffers where the file holds none."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lightning import AdapterBank, inject, load_adapter, save_adapter
from lora_lightning.errors import BaseMismatchError
from lora_lightning.model.fingerprint import fingerprint
from tests.helpers.files import rewrite
from tests.helpers.training import randomise

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def convnet() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=4).eval()


def drifted() -> torch.nn.Module:
    """As after one forward in training mode."""
    model = convnet()
    model.train()(3 + 2 * X)
    return model.eval()


@pytest.fixture(params=["source statistics", "moved statistics"])
def saved(request, tmp_path):
    model = convnet()
    inject(model, rank=2, trainable=[])
    randomise(model)
    moved = request.param == "moved statistics"
    if moved:
        model.train()(X - 2)
    return model.eval(), save_adapter(model, tmp_path / "a.safetensors"), moved


def test_a_base_of_other_statistics_is_another_base(saved):
    """Except for those that the adapter brings."""
    model, path, moved = saved
    other, expected = convnet(), model(X)
    load_adapter(other, path)
    assert torch.equal(other(X), expected)
    if moved:
        other = drifted()
        load_adapter(other, path)
        assert torch.equal(other(X), expected)
        return
    for load in (load_adapter, lambda m, p: AdapterBank(m, {"a": p})["a"].__enter__()):
        other = drifted()
        source = other(X)
        with pytest.raises(BaseMismatchError, match=r"running statistics.*check='structure'"):
            load(other, path)
        assert torch.equal(other(X), source)
    load_adapter(other, path, check="structure")


def test_files_without_the_hash_of_buffers_load_as_before(saved, tmp_path):
    model, path, _ = saved
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_lightning"])
    header["base"].pop("statistics", None)
    del header["checksum"]  # which those files do not have either
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"lora_lightning": json.dumps(header)})
    other = convnet()
    load_adapter(other, old)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_files_written_of_a_wrapped_model_once(saved, wrapper):
    """Their names, and the hash of them, begin with the wrapper's."""
    model, path, _ = saved

    def rename(tensors, header):
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)
        for target in header["targets"]:
            target["module"] = wrapper + target["module"]
        for kind in ("extras", "buffers"):
            header[kind] = [wrapper + name for name in header[kind]]
        header["base"]["structure"] = fingerprint(model, header["extras"], wrapper)["structure"]

    rewrite(path, rename)
    for wrap in (lambda m: m, torch.nn.DataParallel):
        other = wrap(convnet())
        load_adapter(other, path)
        assert torch.equal(other.eval()(X), model(X))
