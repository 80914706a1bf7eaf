"""FSDP2 in one process: what a sharded model computes, saves and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lora_lightning import (
    AdapterBank,
    combine,
    compress,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_active,
    shrink,
    verify,
)
from lora_lightning.errors import AdapterError
from lora_lightning.lora.sharding import is_sharded, whole
from lora_lightning.model.fingerprint import fingerprint
from tests.helpers.training import randomise, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's about its own distributed parts


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh(*shape: int):
    names = ("replicate", "shard") if len(shape) == 2 else None
    return init_device_mesh("cpu", shape or (1,), mesh_dim_names=names)


def sharded(model, *shape: int, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh(*shape), **options)
    return fully_shard(model, mesh=mesh(*shape), **options)


def adapted(base, **options):
    model = copy.deepcopy(base)
    inject(model, **{"rank": 3, "seed": 0, **options})
    randomise(model)
    return model


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def off(model, other):
    with torch.no_grad():
        return float((model(images()) - other(images())).abs().max())


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1,), {}),
        ((1, 1), {}),
        ((1,), {"dora": True}),
        ((1,), {"xs": True}),
        ((1,), {"init": "pissa"}),
        ((1,), {"target_modules": "all", "trainable": []}),
    ],
    ids=["plain", "replicated too", "dora", "xs", "pissa", "all"],
)
def test_a_sharded_model_is_the_model(tmp_path, shape, options):
    base = tiny_vit()
    plain, model = adapted(base, **options), sharded(adapted(base, **options), *shape)
    assert all(is_sharded(p) for p in model.parameters())
    assert off(model, plain) == 0
    for each in (plain, model):
        each(images()).square().sum().backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(whole(parameter.grad), wanted[name], rtol=0, atol=1e-6)
    for path in ("plain", "sharded"):
        save_adapter(plain if path == "plain" else model, tmp_path / path)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "sharded").read_bytes()
    (found,) = verify(model, images())
    assert found.effect > 0.01
    assert found.merge_error < 1e-5
    assert off(model, plain) == 0, "verification has left other values behind"
    gathered = copy.deepcopy(base)
    load_adapter(gathered, tmp_path / "sharded")
    merge(gathered)
    assert off(gathered, plain) < 1e-5


def test_switching_and_reading_sharded_layers():
    base = tiny_vit()
    plain, model = adapted(base), sharded(adapted(base))
    with torch.no_grad():
        model.head.weight.mul_(2)  # trained in full, so the adapter's own
        plain.head.weight.mul_(2)
    with disabled(model):
        assert off(model, base) == 0
    assert off(model, plain) == 0
    set_active(model, None)
    assert off(model, base) == 0
    set_active(model, "default")
    assert off(model, plain) == 0
    layer, other = model.blocks[0].attn.qkv, plain.blocks[0].attn.qkv
    model.reshard()
    model.blocks[0].reshard()
    assert torch.equal(layer.weight, other.weight)
    assert fingerprint(model) == fingerprint(plain)
    assert inject(model, rank=3, seed=0).name == "default"  # again, as a callback does


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"dora": True}, {"xs": True}])
def test_a_base_that_gets_its_weights_after_it_was_sharded(tmp_path, options):
    base = tiny_vit()
    with torch.device("meta"):
        model = tiny_vit()
    inject(model, rank=3, seed=0, **options)
    sharded(model).to_empty(device="cpu")
    model.load_state_dict(sharded(copy.deepcopy(base)).state_dict())
    plain = copy.deepcopy(base)
    inject(plain, rank=3, seed=0, **options)
    wanted = dict(plain.named_parameters())
    assert all(torch.equal(whole(p), wanted[n]) for n, p in model.named_parameters())
    verify(model, images())
    save_adapter(model, tmp_path / "adapter")
    load_adapter(copy.deepcopy(base), tmp_path / "adapter")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding):
        return self.inner(x, src_key_padding_mask=padding)


@torch.no_grad()
def test_a_sharded_encoder_packs_as_torch_does():
    torch.manual_seed(0)
    base = Encoder().eval()
    call = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = adapted(base, target_modules="all", trainable=[])
    model = adapted(base, target_modules="all", trainable=[])
    for part in (model.inner, model):
        fully_shard(part, mesh=mesh())
    assert torch.equal(model(*call), plain(*call))
    with disabled(model):
        assert torch.allclose(model(*call), base(*call), atol=1e-6)
    assert torch.equal(model(*call), plain(*call))
    assert fingerprint(model)["architecture"].endswith("test_sharded.Encoder")


REFUSED = {
    "merge": merge,
    "remove": remove,
    "another adapter": lambda model: inject(model, rank=2, name="other"),
    "compress": lambda model: compress(model, rank=1),
    "shrink": lambda model: shrink(model, 0.5),
    "combine": lambda model: combine(model, {"default": 1.0}, "both"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_whole_weights_is_refused(what):
    model = sharded(adapted(tiny_vit()))
    before = {n: whole(p).clone() for n, p in model.named_parameters()}
    model(images())  # FSDP2 leaves whole parameters in place
    with pytest.raises(AdapterError, match="needs whole weights"):
        REFUSED[what](model)
    model.reshard()
    assert all(torch.equal(whole(p), before[n]) for n, p in model.named_parameters())


def test_files_are_loaded_before(tmp_path):
    base = tiny_vit()
    save_adapter(adapted(base), tmp_path / "a")
    model = sharded(adapted(base))
    with pytest.raises(AdapterError, match="load the file before fully_shard"):
        load_adapter(model, tmp_path / "a", overwrite=True)
    with (
        pytest.raises(AdapterError, match="AdapterBank needs whole"),
        AdapterBank(model, {"a": tmp_path / "a"})["a"],
    ):
        pass


def flat(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


FOREIGN = {
    "FSDP2 before": (lambda base: inject(sharded(base), rank=2), "do it before fully_shard"),
    "FSDP1": (lambda base: flat(adapted(base), use_orig_params=True), "FSDP2"),
    "FSDP1 before": (lambda base: inject(flat(base), rank=2), "FSDP2"),
    "FSDP1 before, views": (lambda base: inject(flat(base, use_orig_params=True), rank=2), "FSDP2"),
    "tensor parallel": (
        lambda base: parallelize_module(
            adapted(base), mesh(), {"blocks.0.attn.qkv": ColwiseParallel()}
        ),
        "tensor-parallel",
    ),
    "tensor parallel before": (
        lambda base: inject(
            parallelize_module(base, mesh(), {"blocks.0.attn.qkv": ColwiseParallel()}), rank=2
        ),
        "tensor-parallel",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_ways_to_shard_are_refused(what):
    act, message = FOREIGN[what]
    with pytest.raises(AdapterError, match=message):
        act(tiny_vit())
