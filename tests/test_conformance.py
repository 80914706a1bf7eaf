"""The cases in which today's libraries fail, most of them in silence.

docs/conformance.md says what happens elsewhere, and where a case is tested that is not here.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchaudio
from torch import nn

from lora_lightning import inject, remove, verify
from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import difference
from tests.helpers.audio_zoo import build
from tests.helpers.training import randomise, tiny_vit
from tests.helpers.zoo import ZOO
from tests.model.test_every_timm import wake

pytestmark = pytest.mark.usefixtures("fused_at_any_size")


def check(model: nn.Module, batch, **options) -> nn.Module:
    """Inject, verify (gradient, effect, merge within 1e-5), remove: the base bit for bit."""
    model.eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    inject(model, **{"rank": 2, "trainable": [], "clamp_rank": True, **options})
    found = verify(model, batch, tolerance=1e-5)[0]
    assert found.effect > 0
    remove(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return model


def image(size: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def small(name: str, **options) -> nn.Module:
    model = timm.create_model(name, num_classes=4, **options)
    wake(model)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "embed_dim": 24, "depths": (1, 1),
                                     "num_heads": (2, 2), "window_size": 4}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}),
        ("vit_tiny_patch16_dinov3_qkvb", {"img_size": 32, "depth": 2}),
    ],
)  # fmt: skip
def test_weights_read_by_functional_calls(name, options):
    """BEiT, SwinV2, EVA02, DINOv3 read `self.qkv.weight` instead of calling `self.qkv`."""
    check(small(name, **options), image(options["img_size"]), target_modules="qkv")


def test_wavlm_self_attention():
    model, batch = build("WavLM")
    wake(model)
    check(model, batch, target_modules=["*attention.attention", "out_proj", "re:.*dense"])


def test_conformer_attention_projections():
    model = torchaudio.models.Conformer(16, 2, 32, 2, 3)
    batch = (torch.randn(2, 7, 16), torch.tensor([7, 7]))
    check(model, batch, target_modules=nn.Linear)
    check(model, batch, target_modules=nn.MultiheadAttention)
    check(model, batch, target_modules=nn.Conv1d)


def test_transformer_encoder_layer_fast_path():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2
    )
    check(model, torch.randn(2, 5, 16), target_modules=["self_attn", "out_proj", "linear?"])


NARROW = {"channels": (16, 24, 32, 40)}


@pytest.mark.parametrize("name", ["resnetv2_18", "test_nfnet"])
def test_standardised_convolutions(name):
    options = {"conv_layer": timm.layers.StdConv2d, **NARROW} if name == "resnetv2_18" else {}
    model = small(name, **options)
    assert any("StdConv2d" in type(m).__name__ for m in model.modules())
    check(model, image(), target_modules=nn.Conv2d)


def test_standardised_same_convolutions_of_hybrids():
    layer, x = ZOO["StdConv2dSame"]
    check(layer(), x, target_modules="all")
    model = small("resnetv2_18", conv_layer=timm.layers.StdConv2dSame, **NARROW)
    check(model, image(), target_modules=nn.Conv2d)


def test_dilated_convolutions():
    model = small("resnet18", output_stride=8, **NARROW)
    assert any(m.dilation == (4, 4) for m in model.modules() if isinstance(m, nn.Conv2d))
    check(model, image(), target_modules=nn.Conv2d)


@pytest.mark.parametrize("name", ["convnext_atto", "test_efficientnet", "resnext26ts"])
def test_depthwise_and_grouped_convolutions(name):
    model = small(name)
    grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert grouped
    check(model, image(), target_modules=grouped)
    base = sum(p.numel() for p in model.parameters())
    report = inject(model, rank=2, target_modules=grouped, trainable=[])
    assert report.factor_parameters < 0.2 * base


@pytest.mark.parametrize("name", ["repvit_m0_9", "mobileone_s0", "fastvit_t8"])
def test_reparameterize_an_adapted_model(name):
    model = small(name).eval()
    inject(model, rank=2, target_modules="all", clamp_rank=True, trainable=[], blocks=[0, 1])
    randomise(model, std=0.01)
    with torch.no_grad():
        expected = model(image())
        fused = timm.utils.reparameterize_model(model)
        assert difference([fused(image())], [expected]) < 1e-4


def test_top_level_parameters():
    check(tiny_vit(), image(32), target_modules=["pos_embed", "cls_token"])


def test_layer_drop_under_ddp_is_refused_with_the_remedy(tmp_path):
    from lightning.pytorch.strategies import DDPStrategy

    from lora_lightning.training.checks import check_unused_parameters

    class FakeTrainer:
        strategy = DDPStrategy()

    backbone = tiny_vit()
    backbone.layer_drop = 0.1
    with pytest.raises(ConfigError, match="ddp_find_unused_parameters_true"):
        check_unused_parameters(FakeTrainer(), backbone)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("vit_tiny_patch16_224", "auto"),
        ("swin_tiny_patch4_window7_224", "auto"),
        ("convnext_atto", "auto"),
        ("tf_efficientnet_lite0", "auto"),
    ],
)
def test_what_works_elsewhere_works_here(name, targets):
    options = {
        "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
        "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (1, 1),
                                         "num_heads": (2, 2), "embed_dim": 24},
    }.get(name, {})  # fmt: skip
    check(small(name, **options), image(options.get("img_size", 64)), target_modules=targets)


def test_wav2vec2_linear_layers():
    check(*build("Wav2Vec2"), target_modules=[nn.Linear, "*pos_conv_embed.conv"])
