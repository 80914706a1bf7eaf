"""A batch in which every item has its own adapter gives what one-by-one runs give."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from lora_lightning import AdapterBank, inject, load_adapter, merge, save_adapter, set_active
from lora_lightning.bank.layout import Layout, Seen, locate
from lora_lightning.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFileError,
    AdapterNotFoundError,
    BaseMismatchError,
    ConfigError,
)
from lora_lightning.probe import difference, run
from tests.audio_zoo import build
from tests.conftest import randomise, tiny_vit
from tests.test_every_timm import wake
from tests.zoo import ZOO, targets

NAMES = ["a", "b", None, "c", "a"]


@torch.no_grad()
def write(base: nn.Module, folder, names: str = "abc", each: tuple = (), **options):
    """Files of adapters of different ranks and scalings, whose owned tensors differ as well."""
    paths = {}
    options = {"target_modules": "all" if isinstance(base, nn.Sequential) else "auto", **options}
    for i, name in enumerate(names):
        model = copy.deepcopy(base)
        own = {"rank": 1 + i % 3, "alpha": 2.0 + i, "clamp_rank": True, "seed": i, "trainable": []}
        report = inject(model, **{**own, **options, **(each[i % len(each)] if each else {})})
        randomise(model, 0.3, seed=i)
        live = dict(model.named_parameters())
        for key in report.extras:
            live[key].add_(0.1 * torch.randn(live[key].shape))
        for key, value in model.named_parameters():
            if key.endswith(("magnitude", "core")):
                value.add_(0.2 * torch.rand(value.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1 * i)
                module.running_var.mul_(1 + 0.1 * i)
        paths[name] = save_adapter(model, folder / f"{name}.safetensors")
    return paths


def one_by_one(base: nn.Module, paths, names, batch: tuple, dims=None) -> list[torch.Tensor]:
    """Item i from a run of the whole batch with a model that has its adapter alone."""
    runs = {}
    for name in set(names):
        model = copy.deepcopy(base)
        if name is not None:
            load_adapter(model, paths[name])
        runs[name] = run(model, batch)
    found = []
    for k in range(len(runs[names[0]])):
        d = 0 if dims is None else dims[k]
        rows = [runs[name][k].select(d, i) for i, name in enumerate(names)]
        found.append(torch.stack(rows, d))
    return found


@torch.no_grad()
def check(base, folder, batch, names=NAMES, dims=None, effect: float = 1e-3, **options):
    """Mixed against one by one; the bank and its files are returned for more."""
    batch = batch if isinstance(batch, tuple) else (batch,)
    paths = write(base.eval(), folder, **options)
    before = copy.deepcopy(base.state_dict())
    classes = [type(m) for m in base.modules()]
    bank = AdapterBank(base, folder)
    with bank[names] as model:
        assert model is base
        mixed = run(model, batch)
    expected = one_by_one(base, paths, names, batch, dims)
    assert difference(mixed, expected) <= 1e-5
    assert difference(mixed, run(base, batch)) > effect
    assert [type(m) for m in base.modules()] == classes
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not base._forward_pre_hooks
    return bank, paths


def images(size: int, n: int = len(NAMES)) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(4))


def small(name: str, **options) -> nn.Module:
    model = timm.create_model(name, num_classes=4, **options)
    wake(model)
    return model.eval()


SWIN = {"img_size": 64, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 2)}
IMAGES = {
    "vit": (tiny_vit, 32, {"target_modules": "all"}),
    "swinv2": (
        lambda: small("swinv2_tiny_window8_256", **SWIN, window_size=4),
        64,
        {"target_modules": ["qkv", "proj", "fc?"]},
    ),
    "beit": (
        lambda: small("beit_base_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=2),
        32,
        {"target_modules": "all"},
    ),
    "eva": (
        lambda: small("eva02_tiny_patch14_224", img_size=28, depth=1),
        28,
        {"target_modules": "all"},
    ),
    "efficientnet": (lambda: small("test_efficientnet"), 48, {"target_modules": "all"}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name, tmp_path):
    make, size, options = IMAGES[name]
    torch.manual_seed(0)
    bank, _ = check(make(), tmp_path, images(size), **options)
    assert not any("groups" in place for place in bank.places.values())


def test_windows_are_found_and_stay_right_with_other_batches_and_pictures(tmp_path):
    base = small("swin_tiny_patch4_window7_224", **SWIN, window_size=4, strict_img_size=False)
    bank, paths = check(base, tmp_path, images(64), target_modules="all")
    assert bank.places["layers.0.blocks.0.attn.qkv.weight"] == str(Layout(0, False))
    for n, size in ((2, 64), (3, 96)):
        batch, names = (images(size, n),), ["c", "b", "a"][:n]
        with torch.no_grad(), bank[names]:
            mixed = run(base, batch)
        assert difference(mixed, one_by_one(base, paths, names, batch)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("Conformer", "all"),
        ("Wav2Vec2", "all"),
        ("WavLM", "auto"),
        ("WavLM", "all"),  # one table of positions for all items: attention runs in groups
        ("Emformer", "auto"),
        ("DeepSpeech", "all"),
    ],
)
def test_sound(name, chosen, tmp_path):
    base, batch = build(name)
    check(base, tmp_path, batch, names=["b", "c"], target_modules=chosen)


def test_time_is_not_taken_for_the_batch_when_both_are_of_one_size(tmp_path):
    """PEFT is silently wrong here."""
    base, _ = build("Conformer")
    x, lengths = torch.randn(5, 5, 16), torch.full((5,), 5)
    bank, paths = check(base, tmp_path, (x, lengths))
    assert bank.places["conformer_layers.0.ffn1.sequential.1.weight"] == str(Layout(1, None))
    attention = bank.places["conformer_layers.0.self_attn.out_proj.weight"]
    assert attention == str(Layout(0, True))  # torch flattens it to (T·n, C)
    batch = (torch.randn(2, 9, 16), torch.tensor([9, 4]))
    with torch.no_grad(), bank[["c", None]]:
        mixed = run(base, batch)
    assert difference(mixed, one_by_one(base, paths, ["c", None], batch)) <= 1e-5


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", ZOO)
def test_every_kind_of_layer(kind, tmp_path):
    make, x = ZOO[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = nn.Sequential(make())
    x = torch.cat([x, x.flip(-1), x[:1]])
    with torch.no_grad():
        base(x)  # the old weight norm's hook keeps what it computed, which must be no graph
    options = {"target_modules": ["*pos_embed"] if targets(kind) == "pos_embed" else "all"}
    dims = None
    if kind in ("LSTM", "LSTM projected", "GRU", "RNN"):
        # The last state is (layers, n, H).
        dims = [0] + [1] * (2 if kind.startswith("LSTM") else 1)
    check(base, tmp_path, x, dims=dims, **options)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("vit", {"dora": True}),
        ("vit", {"xs": True}),
        ("vit", {"init": "pissa"}),
        ("vit", {"trainable": ["biases", "norms"]}),
        ("efficientnet", {"dora": True, "target_modules": "all"}),
        ("efficientnet", {"trainable": ["head", "norms"]}),
    ],
)
def test_every_form_of_adapter(model, form, tmp_path):
    make, size, _ = IMAGES[model]
    torch.manual_seed(0)
    check(make(), tmp_path, images(size), **form)


def test_forms_and_targets_differ_between_adapters(tmp_path):
    each = (
        {"dora": True, "target_modules": "attn.*"},
        {"target_modules": ["mlp.*", "head"], "trainable": ["norms"]},
        {"trainable": ["head"], "init": "olora"},
    )
    check(tiny_vit(), tmp_path, images(32), each=each)


def test_what_all_items_share_runs_in_groups(tmp_path):
    base = tiny_vit()
    bank, _ = check(base, tmp_path, images(32), trainable=["pos_embed"])
    assert bank.places["pos_embed"] == "in groups, by the whole model"


def test_one_name_for_all_needs_no_probe_and_none_is_the_source(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths)
    with torch.no_grad():
        source = base(x)
        for names in ("b", ["b"] * 5):
            with bank[names]:
                alone = base(x)
            assert difference([alone], one_by_one(base, paths, ["b"] * 5, (x,))) <= 1e-5
        for names in (None, [None] * 5):
            with bank[names]:
                assert torch.equal(base(x), source)
    assert not bank.places
    assert not torch.equal(alone, source)


def test_a_model_with_adapters_of_its_own(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path, trainable=["head"])
    plain = copy.deepcopy(base)
    load_adapter(base, paths["a"], "own")
    bank = AdapterBank(base, paths)
    with torch.no_grad():
        own = base(x)
        with bank[NAMES]:
            mixed = base(x)
        assert torch.equal(base(x), own)
    assert difference([mixed], one_by_one(plain, paths, NAMES, (x,))) <= 1e-5
    merge(base)
    with pytest.raises(AdapterError, match="unmerge"), bank[NAMES]:
        pass


def test_inputs_get_gradients(tmp_path):
    base, x = tiny_vit().requires_grad_(False), images(32).requires_grad_()
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths)
    with bank[NAMES]:
        base(x).square().sum().backward()
    alone = copy.deepcopy(base)
    load_adapter(alone, paths["c"])
    one = x.detach()[3:4].requires_grad_()
    alone(one).square().sum().backward()
    assert difference([x.grad[3:4]], [one.grad]) <= 1e-4


def test_autocast_computes_in_its_precision(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths, example=x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with bank[NAMES]:
            mixed = base(x)
        expected = one_by_one(base, paths, NAMES, (x,))
    assert mixed.dtype == torch.bfloat16
    assert difference([mixed.float()], [expected[0].float()]) < 0.05


def test_a_model_moved_to_another_precision(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths, check="structure")
    with torch.no_grad(), bank[NAMES]:
        base(x)
    base.double()
    with torch.no_grad(), bank[NAMES]:
        mixed = base(x.double())
    assert mixed.dtype == torch.float64
    assert difference([mixed], one_by_one(base, paths, NAMES, (x.double(),))) <= 1e-12


def test_swapping_does_not_recompile(tmp_path):
    from torch._dynamo.testing import CompileCounter

    base = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(2), nn.Linear(49, 5)).eval()
    x = images(16, 4)
    bank = AdapterBank(base, write(base, tmp_path), example=x)
    counter = CompileCounter()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for names in (["a", "b", "c", "a"], ["c", None, "a", "b"], ["b", "c", "c", "a"]):
        with torch.no_grad(), bank[names]:
            assert difference([compiled(x)], [base(x)]) <= 1e-6
    assert counter.frame_count == 1


# ---- files and memory ------------------------------------------------------------------------


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).eval()


def test_512_adapters_with_a_memory_of_ten(tmp_path):
    base = tiny()
    names = [f"s{i}" for i in range(512)]
    files = write(base, tmp_path, names[:16])
    paths = {name: files[names[i % 16]] for i, name in enumerate(names)}
    bank = AdapterBank(base, paths, capacity=10)
    assert len(bank) == 512
    assert bank.held == []
    x, draw = torch.randn(10, 6), torch.Generator().manual_seed(0)
    for _ in range(4):
        chosen = [names[i] for i in torch.randint(512, (10,), generator=draw)]
        with torch.no_grad(), bank[chosen]:
            mixed = base(x)
        assert difference([mixed], one_by_one(base, paths, chosen, (x,))) <= 1e-5
        assert set(chosen) <= set(bank.held)
        assert len(bank.held) <= 10
    with pytest.raises(AdapterError, match="11 different adapters and capacity is 10"):
        bank[names[:11]].__enter__()


def test_the_one_used_last_stays(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, "abcd")
    bank = AdapterBank(base, paths, capacity=2)
    for name in "abac":
        with bank[name]:
            pass
    assert bank.held == ["a", "c"]
    one = bank.nbytes // 2
    small_bank = AdapterBank(base, paths, capacity_bytes=3 * one)
    for name in "abcd":
        with bank[name], torch.no_grad():
            pass
        with small_bank[name]:
            pass
    assert 0 < small_bank.nbytes <= 3 * one
    with pytest.raises(AdapterError, match="capacity_bytes"):
        AdapterBank(base, paths, capacity_bytes=10)["a"].__enter__()


def test_more_files_later(tmp_path):
    base, x = tiny(), torch.randn(3, 6)
    paths = write(base, tmp_path, "ab")
    bank = AdapterBank(base, tmp_path)
    with torch.no_grad(), bank[["a", "b", "a"]]:
        base(x)
    (tmp_path / "more").mkdir()
    more = write(base, tmp_path / "more", "cb", rank=3, target_modules=["2", "3"], trainable=["3"])
    with pytest.raises(AdapterExistsError, match="'b'"):
        bank.add(more)
    assert bank.add(more, overwrite=True) == ["c", "b"]
    paths |= more
    names = ["c", "b", "a"]
    with torch.no_grad(), bank[names]:
        mixed = base(x)
    assert difference([mixed], one_by_one(base, paths, names, (x,))) <= 1e-5


def test_errors_of_names_and_files(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, ["alice", "bob"])
    bank = AdapterBank(base, [*paths.values()])
    assert bank.names == ["alice", "bob"]
    assert "alice" in bank
    with pytest.raises(AdapterNotFoundError, match="did you mean 'alice'"):
        bank["alise"]
    with pytest.raises(ConfigError, match="no names"):
        bank[[]]
    with pytest.raises(ConfigError, match="a text"):
        bank[["alice", 3]]
    with pytest.raises(ConfigError, match="not empty"):
        AdapterBank(base, {"": paths["bob"]})
    with pytest.raises(AdapterFileError, match="no such file"):
        AdapterBank(base, {"eve": tmp_path / "eve.safetensors"})
    with pytest.raises(AdapterFileError, match="does not exist"):
        AdapterBank(base, tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        AdapterBank(base, tmp_path / "other")
    twin = (tmp_path / "other" / "bob.safetensors").with_suffix(".safetensors")
    twin.write_bytes(paths["bob"].read_bytes())
    with pytest.raises(ConfigError, match="several files are called 'bob'"):
        AdapterBank(base, [paths["bob"], twin])
    with pytest.raises(ConfigError, match="capacity"):
        AdapterBank(base, paths, capacity=0)


def test_errors_of_files_that_do_not_fit(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, "a")
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 3)).eval()
    with pytest.raises(BaseMismatchError, match="shapes"):
        AdapterBank(other, paths)["a"].__enter__()
    with torch.no_grad():
        weights = copy.deepcopy(base)
        weights[0].weight.mul_(2)
    with pytest.raises(BaseMismatchError, match="other weights"):
        AdapterBank(weights, paths)["a"].__enter__()
    broken = copy.deepcopy(base)
    inject(broken, rank=1, trainable=[], target_modules="all")
    with torch.no_grad():
        broken[0].lora["default"]["weight"].lora_B.fill_(float("nan"))
    path = save_adapter(broken, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterFileError, match="NaN"):
        AdapterBank(base, {"nan": path})["nan"].__enter__()


# ---- batches that cannot be ------------------------------------------------------------------


def test_errors_of_batches(tmp_path):
    base = tiny()
    bank = AdapterBank(base, write(base, tmp_path))
    with pytest.raises(AdapterError, match="2 names for a batch of 3"), bank[["a", "b"]]:
        base(torch.randn(3, 6))
    with pytest.raises(AdapterError, match="2 names for a batch of 3"), bank[["a", "a"]]:
        base(torch.randn(3, 6))
    with pytest.raises(AdapterError, match="in force"), bank["a"], bank["b"]:
        pass
    with pytest.raises(AdapterError, match="two items"):
        bank.probe(torch.randn(1, 6))
    base.train()
    with pytest.raises(AdapterError, match=r"model.eval\(\)"), bank["a"]:
        pass


class Mean(nn.Module):
    """Each item is seen relative to the batch: a model in which items interact."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x - x.mean(0))


class Shared(nn.Module):
    """A layer that runs on something that no item has a say in, for a single number."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(x).sum() + self.table.weight.pow(2).sum()


@pytest.mark.parametrize(("make", "why"), [(Mean, "interact"), (Shared, "used by pow")])
def test_models_whose_items_cannot_be_told_apart(make, why, tmp_path):
    base = make().eval()
    paths = write(base, tmp_path, target_modules="all")
    bank = AdapterBank(base, paths)
    x = torch.randn(3, 6)
    with pytest.raises(AdapterError, match=f"(?s)cannot each have.*{why}"), bank[["a", "b", "c"]]:
        base(x)
    with torch.no_grad(), bank["a"]:
        alone = base(x)
    twin = copy.deepcopy(base)
    load_adapter(twin, paths["a"])
    assert difference([alone], [twin(x)]) <= 1e-5


def test_an_order_that_did_not_show_is_asked_for(tmp_path):
    """With one window an item nobody knows whether windows or items come first."""
    base = small("swin_tiny_patch4_window7_224", **SWIN, window_size=4, strict_img_size=False)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths, example=images(16, 2))
    names = ["a", "b", "c"]
    with pytest.raises(AdapterError, match=r"bank\.probe"), bank[names]:
        base(images(32, 3))
    bank.probe(images(64, 2))
    with torch.no_grad(), bank[names]:
        mixed = base(images(32, 3))
    assert difference([mixed], one_by_one(base, paths, names, (images(32, 3),))) <= 1e-5


def test_set_active_afterwards_is_what_it_was(tmp_path):
    base, x = tiny(), torch.randn(3, 6)
    paths = write(base, tmp_path)
    load_adapter(base, paths["a"], "mine")
    set_active(base, None)
    bank = AdapterBank(base, paths)
    with torch.no_grad(), bank[["a", "b", None]]:
        mixed = base(x)
    set_active(base, "mine")
    assert difference([mixed[:1]], [base(x)[:1]]) <= 1e-5


# ---- layouts ---------------------------------------------------------------------------------


def seen(layout: Layout, k: int, n: int, changed: tuple[int, ...] = ()) -> Seen:
    """A tensor of rows that hold their item's value, laid out by `layout` along dimension 1."""
    value = torch.arange(n, dtype=torch.float32)
    for item in changed:
        value[item] += 100
    rows = layout.each(value[:, None], n * k)
    return Seen.of(rows[None].expand(3, -1, -1), n)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("minor", [False, True])
def test_locate(k, minor):
    layout, n = Layout(1, minor), 4
    rows = Layout(0, minor)
    moved = {i: seen(rows, k, n, (i,)) for i in (0, n - 1)}
    found = locate(seen(rows, k, n), seen(rows, k, n + 1), moved, n)
    assert found == (Layout(1, None) if k == 1 else layout)
    interacting = {i: seen(rows, k, n, (i, 1)) for i in (0, n - 1)}
    assert "interact" in locate(seen(rows, k, n), seen(rows, k, n + 1), interacting, n)


@pytest.mark.parametrize("layout", [Layout(0), Layout(1), Layout(1, True), Layout(0, True)])
def test_views_are_undone(layout):
    x = torch.randn(6, 6, 5)
    assert torch.equal(layout.back(layout.items(x, 3)), x)
    chosen = [torch.tensor([2, 0]), torch.tensor([1])]
    parts = [(c, layout.select(x, c, 3)) for c in chosen]
    assert torch.equal(layout.gather(parts, 3), x)
    owner = layout.each(torch.arange(3)[:, None], 6)[:, 0]
    assert torch.equal(parts[1][1], x.index_select(layout.dim, (owner == 1).nonzero()[:, 0]))
