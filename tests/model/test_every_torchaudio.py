"""Every model of torchaudio in a tiny size: each adapted layer alive, neutral to merge, removable.

And what is particular to speech: streaming, beam search, dropped layers, TorchScript.
"""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import timm
import torch
import torchaudio
from torch import nn
from torchaudio.models import RNNTBeamSearch
from torchaudio.pipelines._wav2vec2.utils import _extend_model

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
)
from lora_lightning.errors import AdapterError
from lora_lightning.model import state as states
from lora_lightning.model.families import by_structure, by_table
from lora_lightning.model.family_tables import TORCHAUDIO, TORCHAUDIO_HEADS
from lora_lightning.model.introspection import below, classifier_modules
from lora_lightning.model.patterns import matches
from lora_lightning.model.probing import difference, randomised, without_noise
from lora_lightning.model.targets import _layers
from lora_lightning.model.view import View
from lora_lightning.speech.tasks.recognisers import ConformerCTC
from tests.helpers.audio_zoo import MODELS, RNNT, build, positional, run, wav2vec2
from tests.helpers.training import Module, randomise, trainer

NAMES = sorted(MODELS)
pytestmark = pytest.mark.usefixtures("fused_at_any_size")
BOTH = ("auto", "all")
SLOW = pytest.mark.slow
# Weights that "all" leaves alone: parameters outside any layer, adapted when they are named.
BARE = {
    "WavLM": ("gru_rel_pos_const",),
    "HuBERT pretraining": ("label_embeddings",),
}
HEADS = {
    "Wav2Vec2": {"aux"},
    "Wav2Vec2 large": {"aux"},
    "WavLM": {"aux"},
    "HuBERT pretraining": {"logit_generator"},
    "RNN-T": {"joiner.linear"},
    "DeepSpeech": {"out"},
    "Wav2Letter": {"acoustic_model.20"},
    "WaveRNN": {"fc3"},
    "SQUIM objective": {"branches.0.2.2", "branches.1.2.2", "branches.2.2.2"},
    "SQUIM subjective": {"predictor.att_pool_layer.linear2"},
}


def test_the_zoo_holds_every_model():
    models = torchaudio.models
    public = [getattr(models, name) for name in models.__all__]
    wanted = {c for c in public if inspect.isclass(c) and issubclass(c, nn.Module)}
    held = {type(m) for name in NAMES for m in build(name)[0].modules()}
    assert wanted - held == {RNNTBeamSearch}  # a search over a model, tested below
    assert {below(build(name)[0], "torchaudio.models") for name in NAMES} <= set(TORCHAUDIO)


def adapted(name: str, **options) -> tuple[nn.Module, tuple]:
    """A frozen model (torch picks some kernels by requires_grad) with a random adapter."""
    model, batch = build(name)
    model.requires_grad_(False)
    settings = {"rank": 2, "clamp_rank": True, "trainable": [], "seed": 0, **options}
    inject(model, **settings)
    randomise(model)
    return model, batch


def equal(model: nn.Module, batch: tuple, expected: list[torch.Tensor]) -> bool:
    with torch.no_grad():
        return all(map(torch.equal, run(model, batch), expected))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, "auto" if name == "HDemucs" else "all") for name in NAMES),  # it has many layers
        *(pytest.param(name, "all" if name == "HDemucs" else "auto", marks=SLOW) for name in NAMES),
    ],
)
def test_every_model(name, targets):
    model, batch = build(name)
    model.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        source = run(model, batch)
    layers = {(t.name, t.tensor) for t in _layers(View(model))}
    options = {"rank": 2, "clamp_rank": True, "trainable": [], "seed": 0}
    report = inject(model, target_modules=targets, **options)
    assert equal(model, batch, source), "not the base's output at the start"
    assert before.keys() <= model.state_dict().keys()
    # Gradients of all factors in training and in eval, effect in eval, merging.
    assert verify(model, batch, forward=positional, tolerance=1e-5)[0].effect > 0
    if targets == "all":  # which has the layers of "auto" among its own
        assert without_effect(model, batch, training=True) == []
        assert without_effect(model, batch, training=False) == []
    assert {(row.module, row.tensor) for row in report.rows} <= layers

    randomise(model)
    with torch.no_grad():
        effective = run(model, batch)
    merge(model)
    unmerge(model)
    assert equal(model, batch, effective)
    remove(model)
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert equal(model, batch, source)


@torch.no_grad()
def without_effect(model: nn.Module, batch: tuple, training: bool) -> list[str]:
    """Adapted layers that change nothing when their random factors alone are switched on."""
    silent = []
    found = View(model).adapted
    factors = states.named_factors(model, "default")
    with randomised(model, factors), without_noise(model, training), disabled(model):
        source = run(model, batch)
        for path, layer in found.items():
            layer.lora_active = "default"
            if difference(run(model, batch), source) == 0:
                silent.append(path)
            layer.lora_active = None
    model.eval()
    return silent


@pytest.mark.parametrize("name", NAMES)
def test_all_reaches_every_weight_that_takes_part(name):
    """Any matrix with a gradient is adapted, behind a parametrization, or listed in BARE."""
    model, batch = build(name)
    with without_noise(model, training=True):
        terms = [out for out in run(model, batch) if out.requires_grad]
    sum(t[t.isfinite()].square().sum() + t[t.isfinite()].sum() for t in terms).backward()
    used = {n for n, p in model.named_parameters() if p.dim() > 1 and p.grad is not None}
    inject(model, rank=1, target_modules="all", trainable=[])
    reached = {t.path for t in _layers(View(model))}
    missed = {n for n in used if n.split(".parametrizations.")[0] + ".weight" not in reached}
    missed -= reached
    assert {n.split(".")[-1] for n in missed} == set(BARE.get(name, ()))


@pytest.mark.parametrize("name", sorted(BARE))
def test_bare_parameters_are_adapted_by_name(name):
    model, batch = build(name)
    model.requires_grad_(False)
    inject(model, rank=1, target_modules=list(BARE[name]), trainable=[])
    assert verify(model, batch, forward=positional, tolerance=1e-5)[0].effect > 0


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, "all") for name in NAMES),
        *(pytest.param(name, "auto", marks=[] if name == "RNN-T" else SLOW) for name in NAMES),
    ],
)
def test_copies_checkpoints_and_files(name, targets, tmp_path):
    model, batch = adapted(name, target_modules=targets)
    with torch.no_grad():
        expected = run(model, batch)
    assert equal(copy.deepcopy(model), batch, expected)

    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin, _ = adapted(name, target_modules=targets, seed=1)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert equal(twin, batch, expected)

    path = save_adapter(model, tmp_path / "adapter.safetensors")
    fresh, _ = build(name)
    load_adapter(fresh.requires_grad_(False), path)
    assert equal(fresh, batch, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_source_checkpoint_loads_strictly(name):
    plain, batch = build(name)
    model, _ = build(name)
    inject(model.requires_grad_(False), rank=2, target_modules="all", clamp_rank=True, trainable=[])
    other = {k: 0.9 * v if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    for m in (plain, model):
        m.load_state_dict(other, strict=True)
    with torch.no_grad():
        # Frozen, the source takes a fused path in eval, which rounds otherwise.
        assert difference(run(model, batch), run(plain.requires_grad_(False), batch)) < 1e-6


# Families


@pytest.mark.parametrize("name", NAMES)
def test_heads(name):
    model, _ = build(name)
    heads = classifier_modules(model)
    assert heads == HEADS.get(name, set())
    parent = nn.ModuleDict({"front": nn.Linear(2, 2), "speech": model})
    assert classifier_modules(parent) == {f"speech.{h}" for h in heads}
    rows = inject(model, rank=1, target_modules="auto", trainable=[]).rows
    assert not any(row.module == h or row.module.startswith(f"{h}.") for row in rows for h in heads)
    assert not any("extractor" in row.module for row in rows)


def test_an_encoder_has_no_head_but_what_is_around_it_may():
    encoder = wav2vec2(aux_num_out=None)
    assert classifier_modules(encoder) == set()
    assert classifier_modules(nn.ModuleDict({"encoder": encoder, "head": nn.Linear(16, 3)})) == {
        "head"
    }


FACTORIES = {
    "wav2vec2_base": (72, {"aux_num_out": 32}),
    "wav2vec2_xlsr_300m": (144, {"aux_num_out": 32}),
    "hubert_base": (72, {}),
    "wavlm_base": (48, {}),
    "wavlm_large": (96, {}),
    "emformer_rnnt_base": (106, {"num_symbols": 4097}),
    "conv_tasnet_base": (71, {}),
    "hdemucs_high": (None, {"sources": ["vocals", "rest"]}),
    "squim_objective_base": (32, {}),
    "squim_subjective_base": (72, {}),
    "Tacotron2": (12, {}),
    "WaveRNN": (7, {"upsample_scales": [5, 5, 11], "n_classes": 256, "hop_length": 275}),
    "DeepSpeech": (8, {"n_feature": 80}),
    "Wav2Letter": (10, {"input_type": "waveform"}),
    "Conformer": (
        64,
        {"input_dim": 256, "num_heads": 4, "ffn_dim": 1024, "num_layers": 8,
         "depthwise_conv_kernel_size": 31},
    ),
    "Emformer": (
        50, {"input_dim": 512, "num_heads": 8, "ffn_dim": 2048, "num_layers": 10,
             "segment_length": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("factory", FACTORIES)
def test_tables_fit_the_published_sizes(factory):
    """Default rank; every pattern of the family finds a layer; nothing is refused."""
    layers, settings = FACTORIES[factory]
    with torch.device("meta"):
        model = getattr(torchaudio.models, factory)(**settings)
    found = by_table(model, list(_layers(View(model))))
    report = inject(model, trainable=[])
    heads = classifier_modules(model)
    paths = {t.path for t in found if t.name not in heads}
    assert len(report.rows) == len(paths) == (layers or len(report.rows))
    share = report.factor_parameters / sum(p.numel() for p in model.parameters())
    assert share < (0.2 if factory in ("hdemucs_high", "conv_tasnet_base") else 0.06)


def test_every_pattern_of_the_tables_matches_something():
    used, heads = set(), set()
    for name in NAMES:
        model, _ = build(name)
        for path, module in model.named_modules():
            key = below(module, "torchaudio.models")
            inner = [n for n, m in module.named_modules() if n and m._parameters]
            for table, seen in ((TORCHAUDIO, used), (TORCHAUDIO_HEADS, heads)):
                seen |= {(key, p) for p in table.get(key, ()) if any(matches(p, n) for n in inner)}
            assert path is not None
    assert used >= {
        (k, p)
        for k, patterns in TORCHAUDIO.items()
        for p in patterns
        if not k.startswith(("squim.subjective", "wav2vec2"))  # one table for several of them
    }
    assert heads == {(k, p) for k, patterns in TORCHAUDIO_HEADS.items() for p in patterns}


def test_a_bundle_s_wrapper_is_seen_through():
    model = _extend_model(wav2vec2(), normalize_waveform=True)
    names = {row.module for row in inject(model, rank=2, trainable=[]).rows}
    assert names == {f"model.{row.module}" for row in inject(wav2vec2(), rank=2).rows}
    assert classifier_modules(model) == {"model.aux"}


def test_the_table_of_the_conformer_is_the_rule_by_structure():
    model = ConformerCTC(dim=16, num_layers=2, num_heads=2, ffn_dim=32, kernel_size=3, n_mels=8)
    layers = list(_layers(View(model)))
    assert by_table(model, layers) == by_structure(model, layers)


@pytest.mark.parametrize("name", ["Wav2Vec2", "Conformer"])
def test_two_towers_are_adapted_both(name):
    model = nn.ModuleDict({"a": build(name)[0], "b": build(name)[0]})
    names = [row.module for row in inject(model, rank=2, trainable=[]).rows]
    halves = [[n[2:] for n in names if n.startswith(f"{tower}.")] for tower in "ab"]
    assert halves[0] == halves[1] != []


def test_every_block_of_a_timm_model_whose_family_is_that_of_its_blocks():
    with torch.device("meta"):
        model = timm.create_model("pit_ti_224")
    assert len(inject(model, rank=2, trainable=[]).rows) == 4 * 12


def test_auto_beside_an_adapter_on_the_root_s_own_parameters():
    """The root is of another class then, but of the same family."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=3)
    alone = {row.module for row in inject(copy.deepcopy(model), rank=2, trainable=[]).rows}
    inject(model, name="positions", rank=2, target_modules="pos_embed", trainable=[])
    beside = inject(model, name="attention", rank=2, trainable=[])
    assert {row.module for row in beside.rows} == alone


# Streaming and search

SEGMENT, RIGHT = RNNT["segment_length"], RNNT["right_context_length"]


def stream(model: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """The encoder's output (1, F, D), segment by segment."""
    state, chunks = None, []
    with torch.no_grad():
        for start in range(0, frames.shape[1] - RIGHT, SEGMENT):
            chunk = frames[:, start : start + SEGMENT + RIGHT]
            out, _, state = model.transcribe_streaming(
                chunk, torch.tensor([SEGMENT + RIGHT]), state
            )
            chunks.append(out)
    return torch.cat(chunks, 1)


def speech() -> torch.Tensor:
    return torch.randn(1, 4 * SEGMENT + RIGHT, RNNT["input_dim"])


@pytest.mark.parametrize("targets", BOTH)
def test_streaming(targets):
    model, _ = adapted("RNN-T", target_modules=targets)
    frames = speech()
    with torch.no_grad():
        whole, _ = model.transcribe(frames, torch.tensor([4 * SEGMENT]))
        streamed = stream(model, frames)
        with disabled(model):
            gap = difference(
                [stream(model, frames)], [model.transcribe(frames, torch.tensor([4 * SEGMENT]))[0]]
            )
            source = stream(model, frames)
    assert difference([streamed], [source]) > 1e-3
    assert difference([streamed], [whole]) <= max(1e-5, 2 * gap)
    merge(model)
    assert difference([stream(model, frames)], [streamed]) < 1e-5


def search(model: nn.Module, frames: torch.Tensor, streaming: bool) -> list[tuple]:
    """Hypotheses as (tokens, score), the best first."""
    decoder = RNNTBeamSearch(model, blank=RNNT["num_symbols"] - 1, step_max_tokens=3)
    with torch.no_grad():
        if not streaming:
            found = decoder(frames, torch.tensor([frames.shape[1] - RIGHT]), 3)
            return [(h[0], h[3]) for h in found]
        state, found = None, None
        for start in range(0, frames.shape[1] - RIGHT, SEGMENT):
            chunk = frames[:, start : start + SEGMENT + RIGHT]
            length = torch.tensor([SEGMENT + RIGHT])
            found, state = decoder.infer(chunk, length, 3, state=state, hypothesis=found)
    return [(h[0], h[3]) for h in found]


@pytest.mark.parametrize("streaming", [False, True])
def test_beam_search(streaming):
    model, _ = adapted("RNN-T", target_modules="all")
    frames = speech()
    with_adapter = search(model, frames, streaming)
    with disabled(model):
        source = search(model, frames, streaming)
    merge(model)
    merged = search(model, frames, streaming)
    assert [tokens for tokens, _ in with_adapter] == [tokens for tokens, _ in merged]
    assert [s for _, s in with_adapter] == pytest.approx([s for _, s in merged], rel=1e-4)
    assert [s for _, s in with_adapter] != pytest.approx([s for _, s in source], rel=1e-3)


# TorchScript

SCRIPTABLE = ("RNN-T", "Wav2Vec2", "WavLM", "Conformer", "Emformer", "Tacotron2", "ConvTasNet")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTABLE)
def test_torchscript_of_a_merged_model(name):
    model, batch = adapted(name)
    expected = run(model, batch)
    merge(model)
    scripted = torch.jit.script(model)
    assert difference(run(scripted, batch), expected) < 1e-5
    if name not in ("Wav2Vec2", "WavLM"):  # of those, torchaudio removes the weight norm
        unmerge(model)
        assert equal(model, batch, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTABLE)
def test_torchscript_before_merging_names_the_remedy(name):
    model, _ = adapted(name)
    with pytest.raises(AdapterError, match=r"call merge\(model\) before"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore")
def test_tracing_before_merging():
    """A trace holds the adapter; where methods are exported as well, those need merging."""
    model, batch = adapted("Conformer")
    assert difference(run(torch.jit.trace(model, batch), batch), run(model, batch)) < 1e-6
    model, batch = adapted("RNN-T")  # it exports methods beside forward
    with pytest.raises(AdapterError, match=r"call merge\(model\) before"):
        torch.jit.trace(model, batch)


@pytest.mark.filterwarnings("ignore")
def test_weight_norm_that_scripting_removed_is_missed_in_words():
    model, _ = adapted("Wav2Vec2", target_modules="all")
    merge(model)
    torch.jit.script(model)
    with pytest.raises(AdapterError, match="load the source model again"):
        unmerge(model)


# Dropped layers


class Speech(Module):
    def training_step(self, batch, batch_idx):
        return self.model(batch[0])[0].square().mean()


def test_layer_drop(tmp_path):
    """Half of the layers are skipped at random: no false alarm, and factors that learn."""
    torch.manual_seed(0)
    model = wav2vec2(encoder_layer_drop=0.5, aux_num_out=5, encoder_num_layers=4)
    assert model.encoder.transformer.layer_drop == 0.5
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 800)), 2)
    module, callback = Speech(model, lr=1e-2), LoRACallback(rank=2, trainable=[])
    trainer(tmp_path, callback).fit(module, data)
    assert model.encoder.transformer.layer_drop == 0.5
    moved = [bool(f.lora_B.any()) for f in states.named_factors(model, "default").values()]
    assert all(moved)
    assert len(moved) == 4 * 6


def test_the_report_can_be_written_down():
    report = inject(build("RNN-T")[0], rank=2)
    assert "joiner.linear" in json.dumps(list(report.extras))
