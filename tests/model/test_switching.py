"""Blocks restore the model completely, and switching is all or nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Waiting
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lora_lightning import (
    AdapterBank,
    adapters,
    combine,
    compress,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_active,
    unmerge,
    verify,
)
from lora_lightning.errors import AdapterError, AdapterFileError
from lora_lightning.model import lending
from lora_lightning.model.probing import difference
from lora_lightning.model.shrinkage import adapter_values, restore, shrink
from tests.helpers.interrupt import ERRORS, everything, lines_of, same
from tests.helpers.training import randomise, tiny_vit


def two_adapters() -> nn.Module:
    model = tiny_vit()
    for name in ("one", "two"):
        inject(model, name=name, rank=2, trainable=["head*"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
    return model


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "set_active": lambda model, path: set_active(model, "one"),
    "none active": lambda model, path: set_active(model, None),
    "merge": lambda model, path: merge(model),
    "unmerge": lambda model, path: unmerge(model),
    "remove": lambda model, path: remove(model),
    "inject": lambda model, path: inject(model, name="three", rank=2),
    "load_adapter": lambda model, path: load_adapter(model, path / "one", "three"),
    "save_adapter": lambda model, path: save_adapter(model, path / "other"),
}


@pytest.mark.parametrize("call", CALLS)
def test_adapters_do_not_change_while_the_model_is_the_source(call, tmp_path):
    """Each would be half undone at the end of the block, or keep the source's head as its own."""
    model, x = two_adapters(), torch.randn(2, 3, 32, 32)
    save_adapter(model, tmp_path / "one", "one")
    expected = model(x)
    with disabled(model):
        source = model(x)
        with pytest.raises(AdapterError, match=r"disabled\(model\).*leave the block"):
            CALLS[call](model, tmp_path)
        with disabled(model):  # which is the source already
            assert torch.equal(model(x), source)
        assert torch.equal(model(x), source)
        twin = copy.deepcopy(model)
    assert torch.equal(model(x), expected)
    assert not (tmp_path / "other").exists()
    CALLS["save_adapter"](twin, tmp_path)  # a copy is nobody's
    CALLS[call](model, tmp_path)


def test_a_failed_switch_leaves_the_model_as_it_was():
    """And fails again: the second call must check by itself."""
    model, x = two_adapters(), torch.randn(2, 3, 32, 32)
    model.head = nn.Linear(model.head.in_features, 9)
    expected = model(x)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"shape.*replaced while the adapter was inactive"):
            set_active(model, "one")
        assert torch.equal(model(x), expected)
    set_active(model, "two")
    assert torch.equal(model(x), expected)


def test_models_that_keep_what_they_computed_of_their_biases(tmp_path):
    """As timm's LeViT does in eval: trained biases act, and are removed with the adapter."""
    model, x = timm.create_model("levit_128s", num_classes=3).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        source = model(x)  # fills them
        inject(model, rank=2, trainable=["*attention_biases"])
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_(std=20)
        save_adapter(model, tmp_path / "biases")
        set_active(model, None)
        assert torch.equal(model(x), source)
        set_active(model, "default")
        adapted = model(x)
        assert difference([adapted], [source]) > 1e-6
        with disabled(model):
            assert torch.equal(model(x), source)
        assert torch.equal(model(x), adapted)
        remove(model)
        assert torch.equal(model(x), source)
        load_adapter(model, tmp_path / "biases")
        assert torch.equal(model(x), adapted)
        merge(model)
        assert difference([model(x)], [adapted]) < 1e-5
        unmerge(model)
        assert torch.equal(model(x), adapted)


def test_a_file_is_checked_against_all_layers_before_the_first_is_touched(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = copy.deepcopy(base)
    inject(model, rank=2, target_modules="all", trainable=[])
    save_adapter(model, tmp_path / "file")
    base[1].lora = "mine"
    with pytest.raises(AdapterFileError, match=r"1\.weight.*'lora' of its own"):
        load_adapter(base, tmp_path / "file")
    assert type(base[0]) is nn.Linear


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    model = two_adapters()
    path = tmp_path / ("n" * 255)
    save_adapter(model, path)
    load_adapter(model, path, "again")
    assert adapters(model) == ["one", "two", "again"]
    assert math.isfinite(model(torch.randn(1, 3, 32, 32)).sum().item())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", ["all", ["layers.0.*"], ["layers.1.*"]])
def test_padded_sequences_through_torchs_own_encoder(targets, tmp_path):
    """As torch packs them in eval if its first layer can, without checking the others."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    with torch.no_grad():
        source = model(x, src_key_padding_mask=mask)
        inject(model, rank=2, target_modules=targets, trainable=[])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        found = model(x, src_key_padding_mask=mask)
        one_by_one = [model(x[:1]), model(x[1:, :3])]
        assert difference([found[:1], found[1:, :3]], one_by_one) < 1e-5
        save_adapter(model, tmp_path / "file")
        remove(model)
        assert torch.equal(model(x, src_key_padding_mask=mask), source)
        load_adapter(model, tmp_path / "file")
        again = model(x, src_key_padding_mask=mask)
        assert torch.equal(again[~mask], found[~mask])


class Doubled(nn.TransformerEncoder):
    def forward(self, src, **masks):
        return 2 * super().forward(src, **masks)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", ["all", ["layers.0.*"], ["layers.1.*"]])
@pytest.mark.parametrize("kind", [nn.TransformerEncoder, Doubled])
def test_padded_rows_are_what_torch_makes_of_them(kind, targets, tmp_path):
    """Whole outputs, not valid rows alone: nested tensors leave zeros before the norm."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = kind(layer, 2, nn.LayerNorm(8)).eval(), torch.randn(3, 5, 8)
    nn.init.normal_(model.norm.bias)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [0]])
    soft = torch.zeros(3, 5).masked_fill(mask, -torch.inf)
    paddings, causal = (mask, soft, mask[:2].flip(1)), torch.ones(5, 5).triu(1).bool()

    def outputs(model):
        return [model(x[: len(m)], src_key_padding_mask=m) for m in paddings] + [
            model(x, mask=causal)
        ]

    model.requires_grad_(False)
    with torch.no_grad():
        source = outputs(model)
        inject(model, rank=2, target_modules=targets, trainable=[])
        assert difference(outputs(model), source) < 1e-5
        randomise(model)
        found = outputs(model)
        assert all(torch.equal(found[i][mask], source[i][mask]) for i in (0, 1))
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(torch.equal(outputs(t)[0], found[0]) for t in twins)
        with disabled(model):
            assert all(map(torch.equal, outputs(model), source))
        set_active(model, None)
        assert all(map(torch.equal, outputs(model), source))
        set_active(model, "default")
        path = save_adapter(model, tmp_path / "file")
        merge(model)
        plain = kind(layer, 2, nn.LayerNorm(8)).eval()
        plain.load_state_dict(model.state_dict())
        assert type(model) is kind
        assert all(map(torch.equal, outputs(model), outputs(plain)))
        assert difference(outputs(model), found) < 1e-5
        remove(model)
        assert type(model) is kind
        with AdapterBank(model, {"one": path})["one"]:
            assert difference(outputs(model), found) < 1e-5
        assert all(map(torch.equal, outputs(model), source))


def test_adapters_do_not_change_while_a_bank_is_in_force(tmp_path):
    model, x = two_adapters(), torch.randn(2, 3, 32, 32)
    names = ("one", "two")
    files = {name: save_adapter(model, tmp_path / name, name) for name in names}
    expected, plain = model(x), tiny_vit()
    bank = AdapterBank(model, files)
    with torch.no_grad(), bank["one"]:
        inside = model(x)
        for call in CALLS.values():
            with pytest.raises(AdapterError, match=r"bank\[\.\.\.\]"):
                call(model, tmp_path)
        with pytest.raises(AdapterError, match=r"bank\[\.\.\.\]"), disabled(model):
            pass
        assert torch.equal(model(x), inside)
    assert torch.equal(model(x), expected)
    plain.load_state_dict({n: v for n, v in source(model).items() if n in plain.state_dict()})
    with AdapterBank(plain, files)["one"], pytest.raises(AdapterError, match="leave the block"):
        load_adapter(plain, files["one"])
    assert adapters(plain) == []


def source(model: nn.Module) -> dict[str, torch.Tensor]:
    with disabled(model):
        return {n: v.clone() for n, v in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_shortcuts_of_eval_under_a_bank(tmp_path):
    """Cached biases and packed sequences follow the active adapter, and only that one."""
    model, x = timm.create_model("levit_128s", num_classes=3).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = [model(x)]
        inject(model, rank=2, target_modules=["head*linear"], trainable=["*attention_biases"])
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_(std=20)
        path = save_adapter(model, tmp_path / "biases.safetensors")
        expected.append(model(x))
        remove(model)
        assert torch.equal(model(x), expected[0])
        bank = AdapterBank(model, {"biases": path})
        with bank["biases"]:
            assert torch.equal(model(x), expected[1])
        assert torch.equal(model(x), expected[0])

        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
        mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
        inject(model, rank=2, target_modules=["layers.1.*"], trainable=[])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        expected = [model(x, src_key_padding_mask=mask)]
        path = save_adapter(model, tmp_path / "later.safetensors")
        remove(model)
        with AdapterBank(model, {"later": path})["later"]:
            found = model(x, src_key_padding_mask=mask)
        assert difference([found[~mask]], [expected[0][~mask]]) < 1e-5
        assert model.use_nested_tensor


def spoil(values):
    """Of one factor."""

    def put(model: nn.Module) -> None:
        with torch.no_grad():
            model.blocks[1].mlp.fc2.lora["two"]["weight"].lora_B[3, 1] = values

    return put


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, math.nan),
        (torch.float32, -math.inf),
        (torch.float16, 6e4),  # times A and the scaling is more than float16 holds
        (torch.bfloat16, math.nan),
    ],
)
def test_a_merge_that_is_not_finite_is_refused_and_undone(dtype, value, tmp_path):
    model = two_adapters().to(dtype)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.lora["two"]["weight"].lora_A[1] = 3
    spoil(value)(model)
    before = everything(model)
    with pytest.raises(
        AdapterError, match=r"1 layers \(blocks.1.mlp.fc2 …\) would hold NaN or inf"
    ):
        merge(model)
    assert same(everything(model), before)
    if not math.isfinite(value):
        with pytest.raises(AdapterError, match="'two' holds NaN or infinity"):
            save_adapter(model, tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_nan_in_the_source_merges_and_unmerges():
    """It is not the adapter's."""
    model = two_adapters()
    with torch.no_grad(), disabled(model):
        model.blocks[0].attn.qkv.weight[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    merge(model)
    assert model.blocks[0].attn.qkv.weight.isnan().any()
    unmerge(model)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("call", ["merge", "inject", "beside", "overwrite", "new"])
def test_whatever_interrupts_a_change_leaves_the_model_as_it_was(call, tmp_path):
    """At lines all over the call; `everything` is compared, and the call then works."""
    model = two_adapters()
    path = save_adapter(model, tmp_path / "two")
    work: Callable[[nn.Module], object] = {
        "merge": merge,
        "inject": lambda model: inject(model, name="three", rank=1),
        "beside": lambda model: load_adapter(model, path, "three"),
        "overwrite": lambda model: load_adapter(model, path, "one", overwrite=True),
        "new": lambda model: load_adapter(model, path),
    }[call]
    if call == "new":
        remove(model)
    x = torch.randn(1, 3, 32, 32)
    before, output = everything(model), model(x)
    twin = copy.deepcopy(model)
    lines = lines_of(lambda: work(twin))
    for part, error in zip((0.2, 0.4, 0.5, 0.6, 0.75, 0.85), 2 * ERRORS, strict=True):
        with pytest.raises(type(error)):
            lines_of(lambda: work(model), int(part * lines), error)
        assert same(everything(model), before), part
        assert torch.equal(model(x), output)
    work(model)


def test_threads_wait_or_are_refused_at_once(tmp_path):
    """Switching and loading in four threads leave a whole model; blocks are of one thread."""
    model = tiny_vit()
    x = torch.randn(2, 3, 32, 32)
    for name in ("a", "b"):
        inject(model, rank=2, name=name)
    randomise(model)
    for name in ("a", "b"):
        save_adapter(model, tmp_path / f"{name}.safetensors", name)
    with torch.no_grad():
        expected = {name: (set_active(model, name), model(x))[1] for name in ("a", "b", None)}

    def work(index: int) -> None:
        for turn in range(6):
            name = ("a", "b", None)[(index + turn) % 3]
            if name is not None and turn % 2:
                load_adapter(model, tmp_path / f"{name}.safetensors", overwrite=True)
            set_active(model, name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
        with torch.no_grad():
            for name, output in expected.items():
                set_active(model, name)
                assert torch.equal(model(x), output)
        set_active(model, "a")
        values = adapter_values(model)
        changes = [
            lambda: restore(model, values),
            lambda: shrink(model, 1.0),
            lambda: compress(model, "a", rank=2),
            lambda: verify(model, x),
            lambda: combine(model, {"a": 0.5, "b": 0.5}, "c"),
        ]
        for change in changes:
            with lending._lock:
                waiting = pool.submit(change)
                with pytest.raises(Waiting):
                    waiting.result(0.02)
            waiting.result()
        remove(model, "c")
        set_active(model, "a")
        blocks = [lambda: disabled(model), lambda: AdapterBank(model.eval(), tmp_path)["a"]]
        for block in blocks:
            with block():
                for call in (
                    lambda: set_active(model, "a"),
                    lambda: load_adapter(model, tmp_path / "a.safetensors", "c"),
                    *changes,
                    *(lambda other=other: other().__enter__() for other in blocks),
                ):
                    with pytest.raises(AdapterError, match="another thread"):
                        pool.submit(call).result()
    assert sorted(adapters(model)) == ["a", "b"]
