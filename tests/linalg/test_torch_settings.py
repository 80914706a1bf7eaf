"""Settings that belong to the whole process come back exactly, whichever way they were set."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from lora_lightning import inject, verify
from lora_lightning.linalg.decompose import truncated_svd
from lora_lightning.linalg.torch_settings import (
    forked_rng,
    ieee,
    rng_states,
    rounding,
    without_cudnn,
)
from lora_lightning.training.prefix_cache.callback import PrefixCache
from tests.helpers.training import tiny_vit

OPERATORS = [(b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul", "conv", "rnn")]
get, set_ = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


@pytest.fixture(autouse=True)
def _restored():
    before = [(*key, get(*key)) for key in [("generic", "all"), *OPERATORS]]
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for setting in before[::-1]:
        set_(*setting)
    for operator in (*OPERATORS[:2], *OPERATORS[4:]):
        set_(*operator, "none")


def settings() -> list[object]:
    """All of them, and what each would inherit from another generic one."""
    found: list[object] = [torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled]
    generic = get("generic", "all")
    for precision in (generic, "ieee", "tf32", "bf16", "none", generic):
        set_("generic", "all", precision)
        found += [get(*operator) for operator in OPERATORS]
    for legacy in (torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision):
        with suppress(RuntimeError):  # of which the two ways disagree
            found.append(legacy())
    return found


@pytest.mark.parametrize(
    "chosen",
    [
        "",
        "set_float32_matmul_precision('high')",
        "set_float32_matmul_precision('medium')",
        "backends.cudnn.allow_tf32 = False",
        "backends.cuda.matmul.allow_tf32 = True",
        "backends.fp32_precision = 'tf32'",
        "backends.fp32_precision = 'bf16'",
        "backends.fp32_precision = 'ieee'",
        "backends.cudnn.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "backends.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = 'tf32'",
    ],
)
@pytest.mark.parametrize("how", [ieee, without_cudnn])
def test_settings_come_back_exactly(chosen, how):
    exec(f"torch.{chosen}" if chosen else "")
    before = settings()
    with suppress(KeyError), how():
        assert not torch.backends.cudnn.enabled
        if how is ieee:
            exact = [get("cuda", "matmul"), *(get("mkldnn", o) for _, o in OPERATORS[5:])]
            assert not {"tf32", "bf16"} & set(exact)
        raise KeyError  # an error within is no reason to leave anything behind
    assert settings() == before


def test_the_rounding_of_products():
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    x, half = torch.ones(1), torch.ones(1, dtype=torch.float16)
    assert rounding(torch.ones(1, device="meta")) == 2.0**-23
    full, tf32, bfloat16 = 2.0**-23, 2.0**-10, 2.0**-7
    assert (rounding(x), rounding(x.double()), rounding(half)) == (full, 2.0**-52, 2.0**-10)
    assert rounding(gpu) == tf32  # of cuDNN, by default
    with torch.autocast("cpu", torch.bfloat16):
        assert (rounding(x), rounding(half), rounding(gpu)) == (bfloat16, bfloat16, tf32)
    with ieee():
        assert rounding(gpu) == full
    torch.set_float32_matmul_precision("medium")
    with without_cudnn():
        assert (rounding(gpu), rounding(x)) == (tf32, bfloat16)


def test_who_reads_the_older_settings_can_do_so_within():
    """As the CTC losses of transformers do, by ``cudnn.flags``."""
    with ieee(), torch.backends.cudnn.flags(enabled=False):
        pass
    torch.set_float32_matmul_precision("high")
    with ieee(), torch.backends.cudnn.flags(enabled=False):
        assert torch.get_float32_matmul_precision() == "high"


@pytest.fixture
def gpus(monkeypatch):
    """Generators of two GPUs, which `torch.manual_seed` seeds with the CPU's."""
    found, seed_cpu = (torch.Generator(), torch.Generator()), torch.manual_seed

    def seed_all(seed: int) -> None:
        for generator in found:
            generator.manual_seed(seed)

    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seed_cpu(seed), seed_all(seed)))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "default_generators", found)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda i: found[i].get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, i: found[i].set_state(s))
    return found


def adapted(**options):
    inject(model := tiny_vit(), rank=2, trainable=[], **options)
    return model


def verified():
    verify(adapted(), torch.randn(2, 3, 32, 32))


def cached():
    model = adapted(blocks=[-1])
    with PrefixCache(budget_mb=1).attach(model) as cache:
        model(torch.randn(2, 3, 32, 32))
    assert cache.boundary_


def decomposed():
    truncated_svd(torch.randn(30, 20), 2, randomised=True)


@pytest.mark.parametrize("look", [verified, cached, decomposed])
def test_no_gpus_generator_moves(gpus, look):
    before = [generator.get_state() for generator in gpus]
    look()
    assert all(torch.equal(g.get_state(), b) for g, b in zip(gpus, before, strict=True))


def test_random_numbers_aside(gpus):
    before = rng_states()
    with forked_rng(3):
        first = torch.rand(2), *(torch.rand(2, generator=g) for g in gpus)
    with forked_rng():
        torch.rand(2, generator=gpus[1])
        assert not torch.equal(rng_states()[2], before[2])
    with forked_rng(3):
        again = torch.rand(2), *(torch.rand(2, generator=g) for g in gpus)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, rng_states(), before))
