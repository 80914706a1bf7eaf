"""`PrefixCache` in models of other shapes: stored, refused, or left alone."""

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
from tests.helpers.audio_zoo import _WAV2VEC2, noise
from tests.helpers.training import randomise
from tests.training.test_prefix_cache import Counted, small_vit


def pictures(size: int = 32) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def small_timm(name: str, **options):
    return lambda: timm.create_model(name, num_classes=4, **options)


SMALL = {**_WAV2VEC2, "encoder_num_layers": 3, "encoder_layer_drop": 0.0}
LENGTHS = torch.tensor([1200, 900, 800])
LAST = {"blocks": [-1]}
ALL = {**LAST, "target_modules": "all"}
# model, inputs, what is adapted, the block that it is cut before
CASES = {
    "ViT": (small_timm("test_vit", img_size=32, patch_size=8), pictures, LAST, "blocks.1"),
    "EfficientNet": (small_timm("test_efficientnet"), pictures, ALL, "blocks.4.0"),
    "ConvNeXt": (small_timm("test_convnext"), lambda: pictures(64), LAST, "stages.3.blocks.0"),
    "wav2vec2": (
        lambda: ta.wav2vec2_model(**SMALL), lambda: (noise(3, 1200), LENGTHS), LAST,
        "encoder.transformer.layers.2",
    ),
    "Conformer": (
        lambda: ta.Conformer(8, 2, 16, 3, 3, dropout=0.1),
        lambda: (noise(3, 20, 8), torch.tensor([20, 15, 9])), LAST, "conformer_layers.2",
    ),
    "a head": (
        lambda: ta.DeepSpeech(8, 16, 7), lambda: (noise(3, 1, 10, 8),),
        {"target_modules": "out"}, "out",
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
        assert (cache._hits, cache._lookups, cache.items_) == (3, 6, 3)
        assert cache.boundary_ == end
        prefix = cache._cut.before
    for _, module in prefix:  # as the cache kept them
        module.training = False
    plain = step(model, turned)
    assert len(now) == len(plain)
    assert all(map(torch.equal, now, plain))
    assert torch.equal(torch.get_rng_state(), drawn), "no check uses up random numbers"
    assert not any("forward" in m.__dict__ for m in model.modules())


class Net(nn.Module):
    """`a` and `b` are frozen, `c` is trained."""

    def __init__(self, b: nn.Module | None = None, first=torch.sub):
        super().__init__()
        self.first = first
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), b or nn.Tanh(), nn.Linear(8, 4)
        self.a.requires_grad_(False)

    def forward(self, x):
        h = self.b(self.a(self.first(x, 0.5)))
        return (self.c(h), h.argmax(-1)) if self.first is torch.add else self.c(h)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


X = noise(4, 8)
PYRAMID = small_timm("test_resnet", features_only=True)


@pytest.mark.parametrize(
    ("model", "x", "target", "message"),
    [
        (lambda: Net(Function(lambda m, x: x - x.mean(0))), X, "c", "depends on the other items"),
        (lambda: Net(Function(lambda m, x: x + torch.randn(8))), X, "c",
         r"for an item is random, is another in eval mode \(PrefixCache\(eval_prefix=True\)"),
        (lambda: Net(Function(lambda m, x: x * (torch.rand(1) > -1))), X, "c", "draw random numb"),
        (PYRAMID, pictures()[0], "re:layer4.*conv2", "feature pyramids"),
        (lambda: Net(Function(lambda m, x: x), torch.Tensor.sub_), X, "c", "writes into its in"),
        (lambda: Net(nn.Dropout(0.5)), X, "c", r"b \(Dropout\) drops with probability 0.5"),
        (lambda: Net(nn.BatchNorm1d(8)), X, "c", "its statistics move"),
        (lambda: ta.wav2vec2_model(**{**SMALL, "encoder_layer_drop": 0.001}),
         noise(3, 1200), "re:.*layers.2.attention.*", "transformer.layer_drop drops whole"),
        (lambda: Net(Function(lambda m, x: x / x.max())), X, "c", "depends on the other items"),
        (lambda: Net(first=torch.add), X, "c", "output is another"),
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

    x, lengths = noise(6, 5, 8), torch.tensor([4, 3, 4, 3, 3, 2])
    with PrefixCache(1).attach(Cuts()) as cache:
        for index in ([0, 1], [2, 3]):
            cache._root(x[index], lengths[index])
        for index in ([1, 3], [4, 5]):  # stored or not
            with pytest.raises(ConfigError, match="or gives other shapes"):
                cache._root(x[index], lengths[index])


@pytest.fixture
def vit() -> nn.Module:
    model = small_vit(depth=4).eval()
    inject(model, rank=2, blocks=[3], name="late", seed=0)
    inject(model, rank=2, blocks=[1], name="early", seed=0)
    randomise(model)
    set_active(model, "late")
    return model


def computed(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the prefix is computed in a forward, which is that of the model in any case."""
    with torch.no_grad():
        expected = model.forward(x)
        before = Counted.items
        assert torch.equal(model(x), expected)
    return Counted.items > before


def test_switching_disabling_merging_and_removing(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        assert not computed(vit, x)
        with disabled(vit):
            assert not computed(vit, x), "the source model begins alike"
        set_active(vit, "early")
        assert computed(vit, x), "an adapter in the prefix: left alone"
        vit(x)
        assert cache.boundary_ == "blocks.1"
        assert not computed(vit, x)
        remove(vit, "late")
        merge(vit)
        assert not computed(vit, x), "merging what comes after is nothing to the prefix"
        unmerge(vit)
        assert not computed(vit, x)
        remove(vit)
        computed(vit, x)


def test_weights_that_change(vit):
    (x,) = pictures()
    weight = vit.blocks[0].mlp.fc1.weight
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        assert not computed(vit, x)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        assert computed(vit, x)
        vit(x)
        assert not computed(vit, x), "a new cache"
        vit.blocks[0].load_state_dict(vit.blocks[0].state_dict())
        assert not computed(vit, x), "the same values once more are no change"
        weight.grad = torch.ones_like(weight)  # of the time before it was frozen
        torch.optim.AdamW([weight], fused=True).step()
        assert computed(vit, x)
        weight.grad = None
        weight.data.copy_(kept)
        cache.end_epoch()
        assert computed(vit, x)
        vit(x)
        assert not computed(vit, x)
        vit.blocks[0] = small_vit().blocks[0].eval().requires_grad_(False)
        assert computed(vit, x)
        vit(x)
        vit.double()
        with pytest.warns(UserWarning, match="change all the time"):
            vit(x.double())
        assert "change all the time" in cache.termination_condition_


def test_modes_and_dropout_that_is_switched_on():
    model = Net(nn.Dropout(0.0)).eval()
    with PrefixCache(1).attach(model) as cache:
        for mode in (False, True, False):
            model.train(mode)(X)
        assert cache._renewals == 1, "train mode is checked as well, once"
        with torch.no_grad():
            assert torch.equal(model(X), model.forward(X))
        assert cache.items_ == 4, "training and eval mode share features"
        model.train().b.p = 0.5
        with pytest.warns(UserWarning, match="drops with probability 0.5"):
            one = model(X)
        assert not torch.equal(one, model(X))


def test_a_hook_and_other_arguments_are_left_alone(vit):
    (x,) = pictures()
    seen = []
    with PrefixCache(20).attach(vit):
        vit(x)
        handle = vit.blocks[1].register_forward_hook(lambda m, i, out: seen.append(out))
        with pytest.warns(UserWarning, match=r"blocks\.1 has a hook"):
            vit(x)
        assert computed(vit, x)
        handle.remove()
        assert [bool(out.isnan().any()) for out in seen] == [False] * 3
        assert not computed(vit, x)
        with torch.no_grad(), torch.autocast("cpu"):
            assert torch.equal(vit(x), vit.forward(x)), "another precision"


class Rounded(nn.Module):
    """The noise of 16-bit products in float32 features: a kernel for each size of a batch."""

    def forward(self, x):
        return x * (1 + 4e-3 * (len(x) % 2))


def test_features_may_be_as_coarse_as_autocast_makes_them():
    model = nn.Sequential(nn.Linear(8, 8), Rounded(), nn.Linear(8, 4))
    inject(model, rank=2, target_modules=["2"], trainable=[])
    x = torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16), PrefixCache(1).attach(model) as cache:
        model(x[:4]), model(x[2:7])
        assert (cache.boundary_, cache.items_) == ("2", 7)
    with PrefixCache(1).attach(model), pytest.raises(ConfigError, match="depends on the other"):
        model(x[:4])


def test_a_layer_that_is_trained_from_now_on_and_a_gradient_of_the_input(vit):
    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        vit(x)
        vit(x.requires_grad_()).sum().backward()
        assert x.grad.abs().sum() > 0
        assert cache._lookups == 3
        x.requires_grad_(False)
        vit.blocks[1].norm1.requires_grad_(True)
        vit(x).sum().backward()
        assert cache.boundary_ == "blocks.1"
        assert vit.blocks[1].norm1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ["blocks.0", "blocks.3", "norm"])
def test_after_ctrl_c_modules_have_their_own_forward_again(vit, path):
    def interrupt(*_):
        raise KeyboardInterrupt

    (x,) = pictures()
    with PrefixCache(20).attach(vit) as cache:
        if path != "blocks.0":  # which is served, and not called, from the second forward on
            vit(x)
        vit.get_submodule(path).forward = interrupt
        with pytest.raises(KeyboardInterrupt):
            vit(x)
        del vit.get_submodule(path).forward
        assert [m for m in vit.modules() if "forward" in m.__dict__] == [vit]
        vit(x)
        assert not computed(vit, x)
        assert cache.items_ == 3
    assert "forward" not in vit.__dict__


def test_attaching_twice_and_compiled_models(vit):
    cache = PrefixCache(1).attach(vit)
    for another in (cache, PrefixCache(1)):
        with pytest.raises(ConfigError, match="has a PrefixCache already"):
            another.attach(vit)
    cache.detach()
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        cache.attach(torch.compile(vit))


def test_a_key_is_the_items_own():
    def keys(*args, **kwargs) -> list[bytes]:
        return Inputs(args, kwargs).keys()[1]

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
