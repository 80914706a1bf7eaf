"""int8: adapters on quantised bases, and merged models that are quantised."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning import (
    LoRACallback,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
    verify,
)  # fmt: skip
from lora_lightning.errors import AdapterError, BaseMismatchError, TargetError, WeightWriteError
from lora_lightning.model.probing import difference
from tests.helpers.training import Module, loader, randomise, tiny_vit, trainer

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


def int8(model: nn.Module, head: bool = False) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (head or name != "head")

    quantize_(model, Int8WeightOnlyConfig(), chosen)
    return model


@pytest.fixture
def full():
    torch.manual_seed(0)
    return tiny_vit()


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"xs": True}], ids=str)
def test_an_adapter_on_an_int8_base_is_verified_saved_and_loaded(full, options, tmp_path):
    base = int8(copy.deepcopy(full))
    print("int8 base", difference([base(X)], [full(X)]))
    model = copy.deepcopy(base)
    inject(model, rank=2, **options)
    assert difference([model(X)], [base(X)]) < 1e-5
    verify(model, X)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) / 10)
    path = save_adapter(model, tmp_path / "a.safetensors")
    again = copy.deepcopy(base)
    load_adapter(again, path)
    assert torch.equal(again(X), model(X))
    assert difference([model(X)], [base(X)]) > 1e-3
    with disabled(model):
        assert torch.equal(model(X), base(X))
    with pytest.raises(BaseMismatchError, match="other weights"):
        load_adapter(full, path)
    before = model(X)
    with pytest.raises(AdapterError, match=r"8 adapted layers \(blocks.0.attn.qkv …\) are quantis"):
        merge(model)
    assert torch.equal(model(X), before)
    remove(model)
    assert torch.equal(model(X), base(X))


def test_a_quantised_head_cannot_be_trained(full):
    base = int8(full, head=True)
    with pytest.raises(TargetError, match=r"head.weight is quantised .* trainable=\[\]"):
        inject(base, rank=2)
    inject(base, rank=2, trainable=[])


def test_a_trainer_trains_on_an_int8_base(full, tmp_path):
    base = int8(copy.deepcopy(full))
    module, callback = Module(copy.deepcopy(base)), LoRACallback(rank=2, output_dir=tmp_path)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert difference([module.model.eval()(X)], [base(X)]) > 1e-3
    load_adapter(base, callback.adapter_path_)
    assert torch.equal(base(X), module.model(X))


@torch.no_grad()
def test_a_merged_model_is_quantised_and_saved(full, tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(full)
    inject(model, rank=2)
    randomise(model, 0.02)
    with pytest.raises(WeightWriteError, match="merge"):
        int8(copy.deepcopy(model))
    merge(model)
    expected, torchs = model(X), torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch.save(model.state_dict(), tmp_path / "int8.pt")
    loaded = copy.deepcopy(full)
    weights = torch.load(tmp_path / "int8.pt", weights_only=True)
    loaded.load_state_dict(weights, assign=True)
    assert torch.equal(loaded(X), model(X))
    for small in (model, torchs):
        found = float((small(X) - expected).norm() / expected.norm())
        print("int8 after merging", found)
        assert found < 0.1
    with pytest.raises(AdapterError, match="changed since merge"):
        unmerge(model)
