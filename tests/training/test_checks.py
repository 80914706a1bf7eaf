"""Unusual fits: nothing trained is lost, and untrained adapters are refused."""

from __future__ import annotations

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import (
    combine,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_active,
    unmerge,
)
from lora_lightning.errors import AdapterError, BaseMismatchError, ConfigError, VerificationError
from lora_lightning.model.probing import difference
from lora_lightning.model.state import named_factors
from tests.helpers.networks import Tied
from tests.helpers.training import (
    Module,
    alike,
    fitted,
    fresh,
    loader,
    lora,
    randomise,
    saved,
    tiny_vit,
    trainer,
)


def ranks(module: Module) -> list[int]:
    return [f.spec.rank for f in named_factors(module.model, "default").values()]


@pytest.mark.parametrize(
    ("init", "between"),
    [*((init, "nothing") for init in ("zero", "lora-ga")),
     *(("eva", between) for between in ("nothing", "file", "state dict"))],
)  # fmt: skip
def test_a_second_fit_goes_on_from_the_first(tmp_path, init, between):
    """Data-driven initialisation happens once: again, it would overwrite trained factors."""
    module = fresh()
    trainer(tmp_path, lora(init=init, output_dir=tmp_path)).fit(module, loader())
    x, learnt = torch.randn(2, 3, 32, 32), module.state_dict()
    expected = module.eval()(x).detach()

    class Loads(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.load_state_dict(learnt)

    second = module if between == "nothing" else fresh()
    second.lr = 0.0
    if between == "file":
        load_adapter(second.model, tmp_path / "default.safetensors")
    loads = [Loads()] if between == "state dict" else []
    trainer(tmp_path, lora(init=init), *loads, max_epochs=1).fit(second, loader())
    assert difference([second.eval()(x)], [expected]) < 1e-5


def test_ranks_are_chosen_after_a_validation_and_after_a_failure(tmp_path):
    """Which inject the adapter, without data."""
    auto = {"rank": "explained-variance", "max_rank": 6}
    chosen = fresh()
    trainer(tmp_path, lora(**auto)).fit(chosen, loader())
    validated, first = fresh(), trainer(tmp_path, lora(**auto))
    first.validate(validated, loader(), verbose=False)
    assert set(ranks(validated)) == {6}
    first.fit(validated, loader())
    failed = fresh()
    with pytest.raises(ConfigError, match="loader"):
        trainer(tmp_path, lora(**auto)).fit(failed, [loader(), loader()])
    trainer(tmp_path, lora(**auto)).fit(failed, loader())
    assert ranks(chosen) == ranks(validated) == ranks(failed)
    assert len(set(ranks(chosen))) > 1
    trainer(tmp_path, lora(**auto)).fit(chosen, loader(items=4))  # and once alone
    assert ranks(chosen) == ranks(validated)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_of_another_base_is_refused(tmp_path, weights_only):
    (module, twin), path = alike(2), tmp_path / "it.ckpt"
    fitted(tmp_path, module, lora()).save_checkpoint(path, weights_only=weights_only)
    trainer(tmp_path, lora()).test(twin, loader(), ckpt_path=path, verbose=False)
    torch.manual_seed(9)
    with pytest.raises(BaseMismatchError, match=r"build the module.*same pretrained weights"):
        trainer(tmp_path, lora()).test(Module(), loader(), ckpt_path=path)
    if not weights_only:
        with pytest.raises(BaseMismatchError, match="build the module"):
            fitted(tmp_path, Module(), lora(), max_epochs=3, ckpt=path)


class Detached(Module):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self(batch[0]).detach()), batch[1])

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)


def test_a_backbone_that_the_loss_does_not_depend_on_is_noticed(tmp_path):
    with pytest.raises(VerificationError, match="detached"):
        trainer(tmp_path, lora()).fit(Detached(), loader())


class Alternating(Module):
    """Its first backward pass is another network's, as in adversarial training."""

    def __init__(self, reaches: bool):
        super().__init__()
        self.automatic_optimization, self.reaches = False, reaches
        self.judge = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        ours, its = self.optimizers()
        self.manual_backward(self.judge(self(batch[0]).detach()).mean())
        its.step()
        its.zero_grad()
        out = self(batch[0]) if self.reaches else self(batch[0]).detach()
        self.manual_backward(self.judge(out).mean())
        ours.step()
        ours.zero_grad()

    def configure_optimizers(self):
        own = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.SGD(own, 0.1), torch.optim.SGD(self.judge.parameters(), 0.1)


def test_a_first_backward_pass_of_another_network(tmp_path):
    """Verification waits; where no gradient reaches an adapter, the epoch's end raises."""
    module = Alternating(True)
    trainer(tmp_path, lora(), max_epochs=1).fit(module, loader())
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())
    with pytest.raises(VerificationError, match="no adapter got a gradient"):
        trainer(tmp_path, lora(), max_epochs=1).fit(Alternating(False), loader())


def test_an_adapter_file_beside_checkpoints_of_a_validation(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    options = {"max_epochs": 1, "enable_checkpointing": True, "val_check_interval": 2}
    fitted(tmp_path, Module(), lora(output_dir=tmp_path / "files"), save,
           data=loader(items=16), held_out=loader(), **options)  # fmt: skip
    steps = sorted(p.stem.rpartition("step=")[2] for p in tmp_path.glob("*.ckpt"))
    files = sorted(p.stem.rpartition("step=")[2] for p in (tmp_path / "files").glob("*step=*"))
    assert steps == files == ["2", "4"]


def test_a_replaced_head_is_combined_as_it_is_now():
    model = tiny_vit()
    for name in ("one", "two"):
        inject(model, name=name, rank=2)
    model.reset_classifier(4)
    head = model.head.weight.detach().clone()
    combine(model, {"two": 0.5}, "mean")
    assert torch.equal(model.head.weight, head)
    set_active(model, "two")
    model.reset_classifier(7)
    with pytest.raises(AdapterError, match="replaced"):
        combine(model, {"mean": 0.5}, "mix")
    assert model.head.out_features == 7


def test_a_head_that_the_optimizer_lacks_is_named(tmp_path):
    class Forgets(Module):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if "lora" in n], 0.1)

    with pytest.warns(UserWarning, match=r"leaves out 2 parameters.*head\.weight"):
        trainer(tmp_path, lora()).fit(Forgets(), loader())


def test_the_backbone_may_begin_under_autocast(tmp_path):
    class Stem(Module):
        def __init__(self):
            super().__init__(timm.create_model("test_efficientnet", num_classes=4))
            self.stem = nn.Conv2d(3, 3, 1)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(self.stem(batch[0])), batch[1])

    trainer(tmp_path, lora(), max_epochs=1, precision="bf16-mixed").fit(Stem(), loader(size=64))


def test_strict_loading_of_tied_and_shared_modules(tmp_path):
    module = Module(Tied())
    trainer(tmp_path, lora(target_modules=["middle"], trainable=["head*"])).fit(
        module, torch.utils.data.DataLoader([(torch.tensor([1, 2]), torch.tensor([[0.2] * 9] * 2))])
    )
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert "model.middle.weight" not in saved(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])

    shared = nn.Sequential(nn.Linear(4, 4))
    shared.twin = shared[0]
    inject(shared, rank=2, target_modules="all", trainable=[])
    state = {k: v.clone() for k, v in shared.state_dict().items()}
    randomise(shared)
    shared.load_state_dict(state)
    assert not shared.twin.lora["default"]["weight"].lora_B.any()


def test_a_head_frozen_meanwhile_stays_in_the_checkpoint(tmp_path):
    module = Module()
    t = fitted(tmp_path, module, lora())
    module.model.head.requires_grad_(False)
    t.save_checkpoint(tmp_path / "it.ckpt")
    held = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(held)
    assert torch.equal(held["model.head.weight"], module.model.head.weight)


def test_merged_in_inference_mode_and_unmerged_outside(tmp_path):
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    inject(model, rank=2)
    randomise(model)
    expected = model(x)
    with torch.inference_mode():
        merge(model)
    save_adapter(model, tmp_path / "file")
    unmerge(model)
    assert torch.equal(model(x), expected)
    merge(model)
    with pytest.raises(AdapterError, match="merged; call unmerge"):
        trainer(tmp_path, lora()).fit(Module(model), loader())


def test_a_trial_run_leaves_the_file_of_the_real_one(tmp_path):
    trainer(tmp_path, lora(output_dir=tmp_path)).fit(Module(), loader())
    before = (tmp_path / "default.safetensors").read_bytes()
    trainer(tmp_path, lora(output_dir=tmp_path), fast_dev_run=True).fit(Module(), loader())
    assert (tmp_path / "default.safetensors").read_bytes() == before
