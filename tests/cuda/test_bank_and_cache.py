"""A bank's mixed batch on the device, against one adapter after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, load_adapter, set_active
from lora_lightning.model.probing import difference, run
from tests.helpers.audio_zoo import build
from tests.helpers.bank_cases import IMAGES, NAMES, images, one_by_one, write
from tests.helpers.cuda import set_precision
from tests.helpers.training import tiny_vit

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous"),
]


def banked(base: nn.Module, tmp_path, device, **options) -> tuple[AdapterBank, dict]:
    """A bank of files that were written on the CPU, on a base of the device."""
    paths = write(base.eval(), tmp_path, **options)
    return AdapterBank(base.to(device), paths), paths


def compare(bank, base, paths, batch, names=NAMES, limit=1e-4, dims=None) -> None:
    with torch.no_grad():
        with bank[names]:
            mixed = run(base, batch)
        assert difference(mixed, one_by_one(base, paths, names, batch, dims)) <= limit
        assert difference(mixed, run(base, batch)) > 1e-3


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("form", [{}, {"dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize("name", ["vit", "efficientnet", "swinv2"])
def test_pictures(tmp_path, name, form, last, device):
    make, size, options = IMAGES[name]
    torch.manual_seed(0)
    base, x = make(), images(size)
    bank, paths = banked(base, tmp_path, device, **{**options, **form})
    if last:
        base, x = (t.to(memory_format=torch.channels_last) for t in (base, x))
    compare(bank, base, paths, (x.to(device),))


@pytest.mark.parametrize("name", ["Conformer", "Wav2Vec2", "DeepSpeech", "Emformer"])
def test_sound(tmp_path, name, device):
    base, batch = build(name)
    bank, paths = banked(base, tmp_path, device, target_modules="auto")
    compare(bank, base, paths, tuple(t.to(device) for t in batch), ["b", "c"], 5e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(tmp_path, kind, device):
    torch.manual_seed(0)
    base = nn.Sequential(kind(6, 5, batch_first=True))
    bank, paths = banked(base, tmp_path, device)
    x = torch.randn(len(NAMES), 7, 6, device=device)
    dims = [0, *[1] * (2 if kind is nn.LSTM else 1)]
    compare(bank, base, paths, (x,), dims=dims)


def test_a_mixed_batch_is_set_active_one_by_one(tmp_path, device):
    base = tiny_vit()
    bank, paths = banked(base, tmp_path, device)
    model = copy.deepcopy(base)
    for name, path in paths.items():
        load_adapter(model, path, name)
    x = images(32).to(device)
    with torch.no_grad():
        with bank[NAMES]:
            mixed = base(x)
        rows = []
        for i, name in enumerate(NAMES):
            set_active(model, name)
            rows.append(model(x)[i])
    assert difference([mixed], [torch.stack(rows)]) < 1e-4


@pytest.mark.parametrize("setting", ["default", "high"])
def test_a_bank_finds_the_items_under_tf32(tmp_path, setting, device):
    """The probe tells items apart though products are rounded."""
    set_precision(setting)
    for name in ("vit", "efficientnet"):
        make, size, options = IMAGES[name]
        torch.manual_seed(0)
        base = make()
        (folder := tmp_path / name).mkdir()
        bank, paths = banked(base, folder, device, **options)
        compare(bank, base, paths, (images(size).to(device),), limit=3e-2)
        assert not any("groups" in place for place in bank.places.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(tmp_path, dtype, device):
    base, x = tiny_vit(), images(32).to(device)
    bank, paths = banked(base, tmp_path, device)
    with torch.no_grad(), torch.autocast(device.type, dtype):
        with bank[NAMES]:
            mixed = base(x)
        (expected,) = one_by_one(base, paths, NAMES, (x,))
    assert mixed.dtype == dtype
    assert difference([mixed.float()], [expected.float()]) < 0.06


def test_generators_are_as_they_were(tmp_path, device):
    base = tiny_vit()
    bank, _ = banked(base, tmp_path, device)

    def states() -> list[torch.Tensor]:
        own = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
        return [torch.get_rng_state(), *own]

    x = images(32).to(device)
    before = states()
    with torch.no_grad(), bank[NAMES]:
        base(x)
    assert all(map(torch.equal, states(), before))


def test_two_streams(tmp_path, cuda):
    """Batches of other adapters on another stream, without waiting in between."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))).eval()
    bank, _ = banked(base, tmp_path, cuda)
    batches = [torch.randn(5, 64, 512, device=cuda) for _ in range(2)]
    names = [["a", "b", "c", "a", None], ["c", "c", "a", None, "b"]]
    with torch.no_grad():
        expected = []
        for chosen, x in zip(names, batches, strict=True):
            with bank[chosen]:
                expected.append(base(x))
        streams = [torch.cuda.Stream(cuda) for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        for _ in range(20):
            for chosen, x, stream in zip(names, batches, streams, strict=True):
                with torch.cuda.stream(stream), bank[chosen]:
                    found.append(base(x))
        torch.cuda.synchronize()
    for i, out in enumerate(found):
        assert difference([out], [expected[i % 2]]) < 1e-5
