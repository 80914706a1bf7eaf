"""What is stored in models of other shapes, and when a forward is left alone."""

from __future__ import annotations

import pytest
import timm
import torch
import torchaudio.models as ta
from torch import nn

from lora_lightning import PrefixCache, disabled, inject, merge, remove, set_active, unmerge
from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import floats
from lora_lightning.training.prefix_cache.inputs import Inputs
from lora_lightning.training.prefix_cache.store import Store
from tests.helpers.audio_zoo import _LARGE, _WAV2VEC2, noise
from tests.helpers.training import randomise


def pictures(size: int = 32) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def small_timm(name: str, **options):
    return lambda: timm.create_model(name, num_classes=4, **options)


def wav2vec2(**options) -> nn.Module:
    return ta.wav2vec2_model(
        **{**_WAV2VEC2, "encoder_num_layers": 3, "encoder_layer_drop": 0.0, **options}
    )


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True)


class Skip(nn.Module):
    """A U-Net in small: early features come back late; one module is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.middle, self.up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.act(self.stem(x))
        b = self.act(self.down(a))
        c = self.middle(b)
        return {"map": self.head(torch.cat([self.up(torch.cat([b, c], 1)), a], 1)), "early": a}


LENGTHS = torch.tensor([1200, 900, 800])
CASES = {
    "ViT": (small_timm("test_vit", img_size=32, patch_size=8), pictures, {"blocks": [-1]}, 1),
    "EfficientNet": (
        small_timm("test_efficientnet"), pictures, {"blocks": [-1], "target_modules": "all"}, 1,
    ),
    "ConvNeXt": (small_timm("test_convnext"), lambda: pictures(64), {"blocks": [-1]}, 2),
    "BEiT": (
        small_timm("beit_base_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2),
        pictures, {"blocks": [-1]}, 1,
    ),
    "feature pyramid": (
        lambda: timm.create_model("test_resnet", features_only=True),
        pictures, {"target_modules": "re:layer4.*conv2"}, 5,
    ),
    "skip connections": (Skip, pictures, {"target_modules": "middle"}, 2),
    "wav2vec2": (wav2vec2, lambda: (noise(3, 1200), LENGTHS), {"blocks": [-1]}, 2),
    "wav2vec2 large": (lambda: wav2vec2(**_LARGE), lambda: (noise(3, 1200),), {"blocks": [-1]}, 1),
    "WavLM": (
        lambda: ta.wavlm_model(
            **{**_WAV2VEC2, "encoder_num_layers": 3, "encoder_layer_drop": 0.0},
            encoder_num_buckets=8, encoder_max_distance=16,
        ),
        lambda: (noise(3, 1200),), {"blocks": [-1]}, 3,
    ),
    "Conformer": (
        lambda: ta.Conformer(8, 2, 16, 3, 3, dropout=0.1),
        lambda: (noise(3, 20, 8), torch.tensor([20, 15, 9])), {"blocks": [-1]}, 1,
    ),
    "DeepSpeech": (
        lambda: ta.DeepSpeech(8, 16, 7), lambda: (noise(3, 1, 10, 8),),
        {"target_modules": "out"}, 1,
    ),
    "encoder and decoder": (
        transformer, lambda: (noise(3, 5, 8), noise(3, 4, 8)),
        {"target_modules": "re:decoder.layers.1.*"}, 2,
    ),
}  # fmt: skip


def step(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Outputs and gradients of one training step."""
    model.zero_grad()
    torch.manual_seed(5)
    out = list(floats(model(*inputs)))
    sum(o.cos().mean() for o in out if o.requires_grad).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*(o.detach() for o in out), *gradients]


@pytest.mark.filterwarnings("ignore:.*nested tensors.*|.*enable_nested_tensor.*")
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_without(name):
    make, inputs_of, config, stored = CASES[name]
    torch.manual_seed(0)
    model = make().train()
    inject(model, rank=2, seed=0, **config)
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    inputs = inputs_of()
    turned = tuple(x.flip(0) for x in inputs)
    with PrefixCache(20, eval_prefix=True).attach(model) as cache:
        step(model, inputs)
        now = step(model, turned)
        forward = cache._forward
        assert (forward.hits, forward.lookups, len(forward.store)) == (3, 6, 3)
        assert len(forward.found.prefix.kept) == stored
        prefix = forward.found.prefix.modules.values()
    for module in prefix:  # as the cache kept them
        module.training = False
    plain = step(model, turned)
    assert len(now) == len(plain)
    for a, b in zip(now, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not any("forward" in m.__dict__ for m in model.modules())


# ---- what cannot be cut --------------------------------------------------------------------------


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class Centred(nn.Module):
    """An item's features depend on its batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x - x.mean(0))


class Inside(Centred):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), Minus())


class Minus(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Mixed(Centred):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), Random())


class Borrows(Centred):
    """Reaches into a module's weights rather than calling it: nothing comes before the head."""

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.stem.weight))


@pytest.mark.parametrize(
    ("model", "x", "target", "message"),
    [
        (lambda: encoder(False), noise(3, 5, 8), "re:layers.2.*", "batch dimension that is not"),
        (Inside, noise(3, 4), "head", "depends on the other items"),
        (Mixed, noise(3, 4), "head", "stem draws random numbers"),
        (Borrows, noise(3, 4), "head", "head is trained, or has a hook, and no layer comes before"),
        (
            lambda: wav2vec2(encoder_layer_drop=0.001),
            noise(3, 1200),
            "re:.*layers.2.attention.*",
            "encoder.transformer.layer_drop drops whole layers with probability 0.001; set it",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(model, x, target, message):
    torch.manual_seed(0)
    network = model().train()
    inject(network, rank=1, target_modules=target)
    with (
        PrefixCache(1, eval_prefix=True).attach(network),
        pytest.raises(ConfigError, match=message),
    ):
        network(x)


def test_the_batch_may_be_centred_behind_the_prefix():
    model = Centred()
    inject(model, rank=1, target_modules="head")
    x = noise(4, 4)
    with PrefixCache(1).attach(model) as cache:
        step(model, (x,))
        now = step(model, (x[:3],))
        assert cache._forward.hits == 3
    for a, b in zip(now, step(model, (x[:3],)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_length_that_comes_from_the_batch_is_refused():
    class Cut(nn.Module):
        def forward(self, x, lengths):
            return x[:, : int(lengths.max())]

    class Cuts(Centred):
        def __init__(self):
            super().__init__()
            self.cut = Cut()

        def forward(self, x, lengths):
            return self.head(self.stem(self.cut(x, lengths)))

    model = Cuts()
    inject(model, rank=1, target_modules="head")
    x = noise(2, 5, 4)
    with PrefixCache(1).attach(model):
        model(x, torch.tensor([4, 3]))
        with pytest.raises(ConfigError, match="differs, in shape"):
            model(x, torch.tensor([3, 2]))


def test_a_batch_of_one_does_not_write_into_the_store():
    class Writes(Centred):
        def forward(self, x):
            return self.head(self.stem(x).mul_(2.0))

    model = Writes()
    inject(model, rank=1, target_modules="head")
    x = noise(1, 4)
    with PrefixCache(1).attach(model) as cache:
        first = model(x)
        assert torch.equal(model(x), first)
        assert torch.equal(model(x), first)
        assert cache._forward.hits == 2


def test_another_path_is_an_error_and_no_wrong_number():
    times = [1]

    class Loops(Centred):
        def forward(self, x):
            for _ in range(times[0]):
                x = self.stem(x)
            return self.head(x)

    model = Loops()
    inject(model, rank=1, target_modules="head")
    with PrefixCache(1).attach(model):
        model(noise(3, 4))
        times[0] = 0
        with pytest.raises(ConfigError, match="stem was to be called, and the forward ended"):
            model(noise(3, 4))
        times[0] = 1
        model(noise(3, 4))


# ---- forwards that are left alone ----------------------------------------------------------------


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, depth=4, num_classes=4).eval()
    inject(model, rank=2, blocks=[3], name="late", seed=0)
    inject(model, rank=2, blocks=[1], name="early", seed=0)
    randomise(model)
    set_active(model, "late")
    return model


def plainly(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output by the model's own forward, no hooks."""
    with torch.no_grad():
        return model.forward(x)


def test_switching_disabling_merging_and_removing(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache, torch.no_grad():
        with torch.enable_grad():
            vit(x)
        forward = cache._forward
        assert torch.equal(vit(x), plainly(vit, x))
        with disabled(vit):
            assert torch.equal(vit(x), plainly(vit, x))
        assert forward.hits == 6, "the source model begins alike"
        set_active(vit, "early")
        assert torch.equal(vit(x), plainly(vit, x))
        assert forward.hits == 6, "an adapter in the prefix: left alone"
        with torch.enable_grad():
            vit(x)
        assert cache._forward.end == "blocks.1.attn.qkv"
        assert torch.equal(vit(x), plainly(vit, x))
        assert forward.hits == 9
        remove(vit, "late")
        merge(vit)
        assert torch.equal(vit(x), plainly(vit, x))
        unmerge(vit)
        assert torch.equal(vit(x), plainly(vit, x))
        assert forward.hits == 15, "merging what comes after is nothing to the prefix"
        remove(vit)
        assert torch.equal(vit(x), plainly(vit, x))


def test_weights_that_change(vit):
    (x,) = pictures()

    def served() -> int:
        """Hits of two forwards: none in the first, the features being others now."""
        before = cache._forward.hits
        torch.testing.assert_close(vit(x), vit.forward(x))
        assert cache._forward.hits == before
        torch.testing.assert_close(vit(x), vit.forward(x))
        return cache._forward.hits - before

    with PrefixCache(20).attach(vit) as cache:
        assert served() == 3
        with torch.no_grad():
            vit.blocks[0].mlp.fc1.weight.mul_(1.5)
        assert served() == 3
        vit.blocks[0].mlp.fc1.weight.data.mul_(1.5)  # past the version counter
        cache._forward.check_weights()
        assert served() == 3
        vit.blocks[0] = timm.create_model("test_vit", img_size=32, patch_size=8).blocks[0].eval()
        vit.blocks[0].requires_grad_(False)
        assert served() == 3
        x = x.double()
        vit.double()
        assert served() == 3


def test_weights_that_change_all_the_time_switch_it_off(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        for _ in range(4):
            vit(x)
            with torch.no_grad():
                vit.pos_embed.mul_(1.01)
        with pytest.warns(UserWarning, match="change all the time"):
            vit(x)
        cache.detach()
        assert "change all the time" in cache.termination_condition_


def test_an_unfrozen_layer_moves_the_boundary(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        vit.blocks[1].norm1.requires_grad_(True)
        loss = vit(x).sum()
        loss.backward()
        assert cache._forward.end == "blocks.1.norm1"
        assert vit.blocks[1].norm1.weight.grad.abs().sum() > 0


def test_training_mode_with_dropout_is_left_alone_and_said():
    model = timm.create_model(
        "test_vit", img_size=32, patch_size=8, depth=2, num_classes=4, proj_drop_rate=0.5
    ).eval()
    inject(model, rank=2, blocks=[1])
    (x,) = pictures()
    with PrefixCache(20).attach(model) as cache:
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
        with pytest.warns(UserWarning, match=r"leaves some forwards alone: .*\(Dropout\) drops"):
            one = model(x) if not cache._forward._refusals.clear() else None
        assert not torch.equal(one, model(x)), "dropout is at work"
        assert cache._forward.lookups == 3


def test_someone_who_looks_at_a_block_sees_it(vit):
    (x,) = pictures()
    seen = []
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        handle = vit.blocks[1].register_forward_hook(lambda m, i, out: seen.append(out.detach()))
        with torch.no_grad():
            vit(x)
        vit(x)
        assert cache._forward.end == "blocks.1"
        vit(x)
        handle.remove()
    assert len(seen) >= 3
    assert all(torch.equal(each[: len(seen[-1])], seen[0][: len(each)]) for each in seen)


def test_a_gradient_of_the_input(vit):
    (x,) = pictures()
    x.requires_grad_()
    with PrefixCache(20).attach(vit) as cache:
        vit(x.detach())
        vit(x).sum().backward()
        assert cache._forward.lookups == 3
    assert x.grad.abs().sum() > 0


def test_inference_mode_and_training_share_features(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        vit(x[:2])
        with torch.inference_mode():
            vit(x)
        vit(x).sum().backward()
        assert (cache._forward.hits, cache._forward.lookups) == (5, 8)


def test_an_error_in_the_forward_leaves_the_model_whole(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit):
        vit(x)
        vit.blocks[3].mlp.register_forward_pre_hook(lambda m, i: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vit(x)
        assert not any("forward" in m.__dict__ for m in vit.modules())


def test_attaching_twice_and_compiled_models(vit):
    cache = PrefixCache(1).attach(vit)
    with pytest.raises(ConfigError, match="attached already"):
        cache.attach(vit)
    with pytest.raises(ConfigError, match="has a PrefixCache already"):
        PrefixCache(1).attach(vit)
    cache.detach()
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        cache.attach(torch.compile(vit))


# ---- keys and store ------------------------------------------------------------------------------


def keys(*args, **kwargs) -> list[bytes]:
    inputs = Inputs(args, kwargs)
    return inputs.keys(inputs.shared())


def test_a_key_is_the_items_own():
    x = noise(4, 6)
    assert keys(x)[1:3] == keys(x[1:3])
    assert keys(x) == keys(x.clone().t().contiguous().t())
    assert len(set(keys(x))) == 4
    lengths = torch.tensor([6, 5, 4, 3])
    assert keys(x, lengths)[2] == keys(x[2:], lengths[2:])[0]
    others = [
        keys(nn.functional.pad(x, (0, 1))), keys(x.double()), keys(x, 1), keys(x, None),
        keys(x, lengths), keys(x, lengths + 1), keys(x=x), keys(x, torch.ones(2)),
        keys(x, torch.zeros(2)), keys(-x),
    ]  # fmt: skip
    with torch.autocast("cpu"):
        others.append(keys(x))
    found = [key for each in [keys(x), *others] for key in each]
    assert len(set(found)) == len(found), "shape, precision, arguments and autocast count"


def test_what_is_stored_comes_back():
    store = Store(1000)
    parts = [noise(3, 4).to(torch.bfloat16), torch.arange(5), torch.tensor([True, False])]
    assert store.put(b"a", parts)
    assert not store.put(b"b", [noise(300)])
    assert store.refused == 1
    assert all(map(torch.equal, store.get(b"a"), parts))
    assert store.get(b"b") is None
    assert store.used == 3 * 64
    store.clear()
    assert (len(store), store.used) == (0, 0)
