"""What `PrefixCache` stores in models of other shapes, refuses, or leaves alone."""

from __future__ import annotations

import pytest
import timm
import torch
import torchaudio.models as ta
from torch import nn

from lora_lightning import PrefixCache, disabled, inject, merge, remove, set_active, unmerge
from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import floats
from lora_lightning.training.prefix_cache.store import Inputs
from tests.helpers.audio_zoo import _LARGE, _WAV2VEC2, noise
from tests.helpers.training import randomise


def pictures(size: int = 32) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def small_timm(name: str, **options):
    return lambda: timm.create_model(name, num_classes=4, **options)


def wav2vec2(**options) -> nn.Module:
    settings = {**_WAV2VEC2, "encoder_num_layers": 3, "encoder_layer_drop": 0.0, **options}
    make = ta.wavlm_model if "encoder_num_buckets" in options else ta.wav2vec2_model
    return make(**settings)


class Skip(nn.Module):
    """A U-Net in small: early features come back late."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        early = self.stem(x).relu()
        return self.head(self.middle(early) + early)


LENGTHS = torch.tensor([1200, 900, 800])
LAST = {"blocks": [-1]}
# model, inputs, what is adapted, the block that it is cut before
CASES = {
    "ViT": (small_timm("test_vit", img_size=32, patch_size=8), pictures, LAST, "blocks.5"),
    "EfficientNet": (
        small_timm("test_efficientnet"), pictures, {**LAST, "target_modules": "all"}, "blocks.4.0",
    ),
    "ConvNeXt": (
        small_timm("test_convnext"), lambda: pictures(64), LAST, "stages.3.blocks.0",
    ),
    "wav2vec2": (
        wav2vec2, lambda: (noise(3, 1200), LENGTHS), LAST, "encoder.transformer.layers.2",
    ),
    "wav2vec2 large": (
        lambda: wav2vec2(**_LARGE), lambda: (noise(3, 1200),), LAST, "encoder.transformer.layers.2",
    ),
    "WavLM": (
        lambda: wav2vec2(encoder_num_buckets=8, encoder_max_distance=16),
        lambda: (noise(3, 1200),), LAST, "encoder.transformer.layers.2",
    ),
    "Conformer": (
        lambda: ta.Conformer(8, 2, 16, 3, 3, dropout=0.1),
        lambda: (noise(3, 20, 8), torch.tensor([20, 15, 9])), LAST, "conformer_layers.2",
    ),
    "a head": (
        lambda: ta.DeepSpeech(8, 16, 7), lambda: (noise(3, 1, 10, 8),),
        {"target_modules": "out"}, "out",
    ),
    "encoder and decoder": (
        lambda: nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True),
        lambda: (noise(3, 5, 8), noise(3, 4, 8)),
        {"target_modules": "re:decoder.layers.1.*"}, "decoder.layers.1",
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
    make, inputs_of, config, end = CASES[name]
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
        drawn = torch.get_rng_state()
        now = step(model, turned)
        forward = cache._forward
        assert (forward.hits, forward.lookups, len(forward.store.records)) == (3, 6, 3)
        assert forward.end == end
        prefix = forward.prefix.cut.before
    for _, module in prefix:  # as the cache kept them
        module.training = False
    plain = step(model, turned)
    assert len(now) == len(plain)
    assert all(map(torch.equal, now, plain))
    assert torch.equal(torch.get_rng_state(), drawn), "no check uses up random numbers"
    assert not any("forward" in m.__dict__ for m in model.modules())


# ---- what is refused -----------------------------------------------------------------------------


class Net(nn.Module):
    """`a` and `b` are frozen, `c` is trained."""

    def __init__(self, b: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), b or nn.Tanh(), nn.Linear(8, 4)
        self.a.requires_grad_(False)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Reads(Net):
    """Uses what a module before the cut leaves behind."""

    def forward(self, x):
        return super().forward(x) + self.b.seen.sum(1, keepdim=True)


class Writes(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


class Borrows(Net):
    """Reaches into a module's weights rather than calling it."""

    def forward(self, x):
        return self.c(nn.functional.linear(x, self.a.weight))


def leave(module, x):
    module.seen = x * 2
    return x


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)  # time first
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


X = noise(4, 8)
PYRAMID = small_timm("test_resnet", features_only=True)


@pytest.mark.parametrize(
    ("model", "x", "target", "message"),
    [
        (encoder, noise(3, 5, 8), "re:layers.2.*", "batch dimension that is not the first"),
        (lambda: Net(Function(lambda m, x: x - x.mean(0))), X, "c", "depends on the other items"),
        (lambda: Net(Function(lambda m, x: x + torch.randn(8))), X, "c", "for an item is random"),
        (lambda: Net(Function(lambda m, x: x * (torch.rand(1) > -1))), X, "c", "draw random numb"),
        (lambda: Reads(Function(leave)), X, "c", "trial forward of Reads.*RuntimeError"),
        (Skip, pictures()[0], "middle", "skip connections"),
        (PYRAMID, pictures()[0], "re:layer4.*conv2", "feature pyramids"),
        (Writes, X, "c", "writes into its input"),
        (Borrows, X, "c", "no layer comes before c"),
        (lambda: Net(nn.Dropout(0.5)), X, "c", r"b \(Dropout\) drops with probability 0.5"),
        (lambda: Net(nn.BatchNorm1d(8)), X, "c", "its statistics move"),
        (
            lambda: wav2vec2(encoder_layer_drop=0.001),
            noise(3, 1200), "re:.*layers.2.attention.*", "transformer.layer_drop drops whole",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused(model, x, target, message):
    torch.manual_seed(0)
    network = model()
    inject(network, rank=1, target_modules=target)
    network.train(model is not PYRAMID)
    with PrefixCache(1).attach(network), pytest.raises(ConfigError, match=message):
        network(x.clone())
    assert not any("forward" in m.__dict__ for m in network.modules())


def test_a_length_that_comes_from_the_batch_is_refused():
    class Cuts(Net):
        def forward(self, x, lengths):
            return self.c(self.a(x[:, : int(lengths.max())]))

    with PrefixCache(1).attach(Cuts()) as cache:
        cache._forward.root(noise(2, 5, 8), torch.tensor([4, 3]))
        with pytest.raises(ConfigError, match="differs, in shape"):
            cache._forward.root(noise(2, 5, 8), torch.tensor([3, 2]))


def test_another_path_is_an_error_and_no_wrong_number():
    model, times = Net(), [1]

    def forward(module, x):
        for _ in range(times[0]):
            x = x.tanh()
        return x if times[0] else model.a(x)

    model.b = Function(forward)
    with PrefixCache(1).attach(model):
        model(X)
        model.forward = lambda x: model.c(model.b(x))
        with pytest.raises(ConfigError, match="another path than in its first batch"):
            model(X)


# ---- never stale ---------------------------------------------------------------------------------


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
        assert forward.end == "blocks.1"
        assert torch.equal(vit(x), plainly(vit, x))
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
        kept = vit.blocks[0].state_dict()
        kept = {name: value.clone() for name, value in kept.items()}
        with torch.no_grad():
            vit.blocks[0].mlp.fc1.weight.mul_(1.5)
        assert served() == 3
        vit.blocks[0].mlp.fc1.weight.data.copy_(vit.blocks[0].mlp.fc1.weight.data.flip(0))
        cache.end_epoch()
        assert served() == 3
        vit.blocks[0].load_state_dict(kept)
        assert served() == 3, "once more"
        vit.blocks[0] = timm.create_model("test_vit", img_size=32, patch_size=8).blocks[0].eval()
        vit.blocks[0].requires_grad_(False)
        assert served() == 3
        vit.blocks[0].load_state_dict(vit.blocks[0].state_dict())
        hits = cache._forward.hits
        vit(x)
        assert cache._forward.hits == hits + 3, "the same values once more are no change"
        x = x.double()
        vit.double()
        assert served() == 3


def test_weights_of_a_validation_only(vit):
    (x,) = pictures()
    weight = vit.blocks[0].mlp.fc1.weight
    with PrefixCache(20).attach(vit.train()) as cache:
        vit(x)
        weight.data.mul_(2)
        vit.eval()
        with torch.no_grad():
            assert torch.equal(vit(x), plainly(vit, x))
        weight.data.div_(2)
        vit.train()
        assert torch.equal(vit(x), plainly(vit, x))
        assert cache._forward.hits == 3, "what was stored before is still there"


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


def test_modes_and_dropout_that_is_switched_on():
    model = Net(nn.Dropout(0.0)).train()
    with PrefixCache(1).attach(model) as cache:
        model(X)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(X), plainly(model, X))
        assert cache._forward.hits == 4, "training and eval mode share features"
        model.train().b.p = 0.5
        with pytest.warns(UserWarning, match="drops with probability 0.5"):
            one = model(X)
        assert not torch.equal(one, model(X))


def test_someone_who_looks_at_a_block_sees_it(vit):
    (x,) = pictures()
    seen = []
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        handle = vit.blocks[1].register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
        with torch.no_grad():
            vit(x)
        vit(x)
        assert cache._forward.end == "blocks.1"
        vit(x)
        handle.remove()
    assert len(seen) == 3
    assert all(torch.equal(a, b) for each in seen for a, b in zip(each, seen[0], strict=True))


def test_a_layer_that_is_trained_from_now_on_and_a_gradient_of_the_input(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        vit(x.requires_grad_()).sum().backward()
        assert x.grad.abs().sum() > 0
        assert cache._forward.lookups == 3
        x.requires_grad_(False)
        vit.blocks[1].norm1.requires_grad_(True)
        vit(x).sum().backward()
        assert cache._forward.end == "blocks.1"
        assert vit.blocks[1].norm1.weight.grad.abs().sum() > 0


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


def test_a_key_is_the_items_own():
    def keys(*args, **kwargs) -> list[bytes]:
        inputs = Inputs(args, kwargs)
        return inputs.keys(inputs.shared())

    x, lengths = noise(4, 6), torch.tensor([6, 5, 4, 3])
    assert keys(x)[1:3] == keys(x[1:3])
    assert keys(x) == keys(x.clone().t().contiguous().t())
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
