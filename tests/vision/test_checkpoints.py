"""Checkpoints of the user's own, as timm, Lightning and torch write them."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3

from lora_lightning import inject, save_adapter
from lora_lightning.errors import ConfigError
from lora_lightning.vision.backbones import create_backbone
from lora_lightning.vision.classifier import Classifier

ARGS = argparse.Namespace(model="test_vit", img_size=32, mean=[0.1, 0.2, 0.3], crop_pct=1.0)


def network(classes=5, size=32):
    return timm.create_model("test_vit", img_size=size, num_classes=classes)


def timm_training(folder, model, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, args=ARGS, checkpoint_dir=str(folder), **more)
    saver.save_checkpoint(1, metric=0.5)
    return folder / "last.pth.tar"


def lightning_training(folder, model):
    module = Classifier(model)
    module.save_hyperparameters({"root": Path("photos"), "rate": 0.1})
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([(torch.randn(3, 32, 32), 0)] * 2, 2))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def plain(folder, weights):
    torch.save(weights, folder / "w.pth")
    return folder / "w.pth"


def safetensors(folder, weights):
    save_file(weights, folder / "w.safetensors")
    return folder / "w.safetensors"


def under(prefix, model):
    return {f"{prefix}{k}": v for k, v in model.state_dict().items()}


WRITERS = {
    "timm": timm_training,
    "lightning": lightning_training,
    "safetensors": lambda folder, m: safetensors(folder, m.state_dict()),
    "compiled in DDP": lambda folder, m: plain(folder, {"model": under("module._orig_mod.", m)}),
    "averaged": lambda folder, m: plain(
        folder, torch.optim.swa_utils.AveragedModel(m).state_dict()
    ),
    "prefixed": lambda folder, m: plain(folder, under("net.backbone.", m) | {"x": torch.ones(1)}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_are_loaded_whole_with_the_head_they_have(writer, tmp_path):
    model = network()
    path = WRITERS[writer](tmp_path, model)
    loaded = create_backbone("test_vit", None, path, size=32)
    own = loaded.state_dict()
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())
    assert loaded.num_classes == 5
    if writer == "timm":
        cfg = loaded.pretrained_cfg
        assert (cfg["input_size"], cfg["mean"], cfg["crop_pct"]) == (
            (3, 32, 32),
            (0.1, 0.2, 0.3),
            1,
        )
        assert network().pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # another model's stays


def test_averaged_weights_are_preferred(tmp_path):
    model = network()
    averaged = ModelEmaV3(model)
    with torch.no_grad():
        averaged.module.head.bias.fill_(7.0)
    path = timm_training(tmp_path, model, model_ema=averaged)
    assert create_backbone("test_vit", None, path, size=32).head.bias.eq(7).all()


def test_one_of_two_networks_is_named(tmp_path):
    both = under("student.", network()) | under("teacher.", teacher := network())
    path, notices = plain(tmp_path, both), []
    with pytest.raises(ConfigError, match=r"2 times, under student\., teacher\.; .*--prefix"):
        create_backbone("test_vit", None, path, size=32)
    loaded = create_backbone("test_vit", None, path, size=32, prefix="teacher", notices=notices)
    assert torch.equal(loaded.head.weight, teacher.head.weight)
    assert "left out (student." in notices[0]
    with pytest.raises(ConfigError, match=r"no name in .* begins with 'net\.'; .* student\., tea"):
        create_backbone("test_vit", None, path, size=32, prefix="net.")


def adapter_of(folder):
    model = network()
    inject(model, rank=1)
    return save_adapter(model, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: plain(f, network(size=64).state_dict()), r"pos_embed.*\n.*another size"),
        (lambda f: plain(f, timm.create_model("test_vit2").state_dict()), "sizes|shared|check"),
        (adapter_of, "factors of an adapter"),
        (
            lambda f: plain(f, {"state_dict": {"stem.w": torch.ones(1)},
                                "args": argparse.Namespace(model="resnet18")}),
            "trained as resnet18",
        ),
        (lambda f: plain(f, {"state_dict": {"stem.w": torch.ones(1)}}), "no name is shared"),
        (lambda f: plain(f, {"w": torch.ones(1), "hook": torch.nn.Linear(1, 1)}),
         r"torch\.nn\.modules\.linear\.Linear.*weights_only=False"),
    ],
    ids=["size", "variant", "adapter", "trained", "foreign", "objects"],
)  # fmt: skip
def test_what_does_not_fit_is_explained(write, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        create_backbone("test_vit", 5, write(tmp_path), size=32)


def test_a_head_that_is_not_there_leaves_the_classes_unknown(tmp_path):
    weights = {k: v for k, v in network().state_dict().items() if not k.startswith("head")}
    with pytest.raises(ConfigError, match="how many classes"):
        create_backbone("test_vit", None, plain(tmp_path, weights), size=32)
