"""The pattern language, blocks, classifiers, the families' table."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from lora_lightning import inject, load_adapter, remove, save_adapter
from lora_lightning.errors import BaseMismatchError, ConfigError, TargetError
from lora_lightning.model.families import TIMM
from lora_lightning.model.introspection import block_list, classifier_modules
from lora_lightning.model.patterns import matches
from lora_lightning.model.view import View
from tests.helpers.networks import quantise
from tests.helpers.training import tiny_vit


def adapted(model: nn.Module, **options) -> list[str]:
    report = inject(model, **{"rank": 1, "trainable": [], **options})
    return [f"{r.module}.{r.tensor}".removesuffix(".weight").lstrip(".") for r in report.rows]


def meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("qkv", "blocks.0.attn.qkv", True),
        ("attn.qkv", "blocks.0.attn.qkv", True),
        ("blocks.0.attn.qkv", "blocks.0.attn.qkv", True),
        ("proj", "blocks.0.attn.proj_out", False),
        ("kv", "blocks.0.attn.qkv", False),
        ("0.attn", "blocks.10.attn", False),
        ("mlp.fc?", "blocks.0.mlp.fc1", True),
        ("blocks.*.fc[12]", "blocks.0.mlp.fc2", True),
        ("re:blocks\\.[01]\\..*", "blocks.1.attn.qkv", True),
        ("re:attn", "blocks.1.attn", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) == expected


def test_names_globs_regular_expressions_and_types():
    assert adapted(tiny_vit(), target_modules="blocks.1.attn.qkv") == ["blocks.1.attn.qkv"]
    assert adapted(tiny_vit(), target_modules="qkv") == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert adapted(tiny_vit(), target_modules="re:.*0.*fc.") == [
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ]
    assert adapted(tiny_vit(), target_modules=nn.Conv2d) == ["patch_embed.proj"]
    assert adapted(tiny_vit(), target_modules="type:Conv2d") == ["patch_embed.proj"]
    assert len(adapted(tiny_vit(), target_modules=nn.Linear)) == 9
    assert adapted(tiny_vit(), target_modules=["pos_embed"]) == ["pos_embed"]
    both = adapted(tiny_vit(), target_modules=["qkv", "*qkv"])
    assert both == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_a_shared_layer_has_two_names():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "h": nn.Linear(6, 2)})
    model["b"] = model["a"]
    for pattern in ("b", "a", "b.weight", "a.weight"):
        report = inject(model, rank=1, target_modules=[pattern], trainable=[], name=pattern[0])
        assert [row.module for row in report.rows] == ["a"]
        remove(model)


def test_exclude_and_blocks():
    names = adapted(tiny_vit(), target_modules="auto", exclude_modules=["mlp.*"], blocks=[-1])
    assert names == ["blocks.1.attn.qkv", "blocks.1.attn.proj"]


def test_blocks_count_the_outermost_list_of_swin():
    """Elsewhere an index matches the inner list; here it is the stage."""
    model = meta("swin_tiny_patch4_window7_224")
    assert block_list(model) == [f"layers.{i}" for i in range(4)]
    names = adapted(model, target_modules="qkv", blocks=[2])
    assert names == [f"layers.2.blocks.{i}.attn.qkv" for i in range(6)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)]),
        ("resnet50", [f"layer{i}" for i in range(1, 5)]),
        ("convnext_tiny", [f"stages.{i}" for i in range(4)]),
        ("tf_efficientnet_lite0", [f"blocks.{i}" for i in range(7)]),
        ("mobilenetv3_large_100", [f"blocks.{i}" for i in range(7)]),
    ],
)
def test_block_lists(name, expected):
    assert block_list(meta(name)) == expected


def test_block_that_does_not_exist():
    with pytest.raises(TargetError, match=r"blocks=\[2\] do not exist: the model has 2 blocks"):
        adapted(tiny_vit(), blocks=[2])
    with pytest.raises(TargetError, match="no outermost list of blocks"):
        adapted(nn.ModuleDict({"a": nn.Linear(2, 2)}), target_modules="a", blocks=[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", {"head"}),
        ("convnext_tiny", {"head.fc"}),
        ("resnet50", {"fc"}),
        ("tf_efficientnet_lite0", {"classifier"}),
        ("deit_tiny_distilled_patch16_224", {"head", "head_dist"}),
    ],
)
def test_classifiers_of_timm(name, expected):
    assert classifier_modules(meta(name)) == expected


def test_classifiers_of_others():
    with torch.device("meta"):
        assert classifier_modules(torchvision.models.resnet18()) == {"fc"}
        assert classifier_modules(torchvision.models.vgg11()) == {"classifier.6"}
        assert classifier_modules(torchvision.models.vit_b_16()) == {"heads.head"}
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert classifier_modules(plain) <= {"2"}
    assert classifier_modules(meta("vit_tiny_patch16_224", num_classes=0)) == set()


@pytest.mark.parametrize("family", sorted(TIMM))
def test_the_table_matches_its_family(family):
    """A table that matches nothing would fall back silently."""
    import json
    from pathlib import Path

    from lora_lightning.model.families import by_table
    from lora_lightning.model.targets import _layers

    smallest = json.loads(Path(__file__).with_name("timm_smallest.json").read_text())
    # deit's smallest entry is a plain VisionTransformer; its own class is the distilled one.
    model = meta({**smallest, "deit": "deit_tiny_distilled_patch16_224"}[family])
    assert type(model).__module__ == f"timm.models.{family}"
    assert by_table(model, list(_layers(View(model))))


def test_auto_of_convnext_is_not_only_the_classifier():
    names = adapted(meta("convnext_atto"))
    assert len(names) == 24
    assert all(n.endswith(("mlp.fc1", "mlp.fc2")) for n in names)


def test_auto_never_takes_the_classifier():
    for name in (
        "vit_tiny_patch16_224",
        "convnext_atto",
        "resnet18",
        "vgg11",
        "mobilenetv3_small_050",
    ):
        model = meta(name)
        heads = classifier_modules(model)
        assert heads
        assert not heads & set(adapted(model))


def test_all_leaves_what_is_trained_in_full():
    assert "head" in adapted(tiny_vit(), target_modules="all")
    assert "head" not in adapted(tiny_vit(), target_modules="all", trainable=["head"])


def test_named_target_is_adapted_not_trained_in_full():
    model = tiny_vit()
    report = inject(model, rank=1, target_modules=["qkv", "head"], trainable=["head"])
    assert "head" in [r.module for r in report.rows]
    assert list(report.extras) == ["head.bias"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("qvk", "'qvk' matches nothing; did you mean 'qkv'"),
        ("zzzz", "'zzzz' matches nothing; adaptable layers end in fc1, fc2, head, proj, qkv"),
        ("attn", "matches only modules without a weight of their own"),
        ("norm", r"matches only modules without a weight .*train them in full, list them in"),
        ("type:Linaer", "matches nothing"),
        ("type:torch.nn.Linaer", "cannot be imported"),
        ("re:(", "is no regular expression"),
        ("cls_token", None),
    ],
)
def test_what_matches_nothing(pattern, message):
    if message is None:  # a parameter of one row still is a matrix
        assert adapted(tiny_vit(), target_modules=pattern) == ["cls_token"]
        return
    with pytest.raises(TargetError, match=message):
        adapted(tiny_vit(), target_modules=pattern)


def test_nothing_left_and_nothing_to_choose():
    with pytest.raises(TargetError, match="no layer is left to adapt"):
        adapted(tiny_vit(), exclude_modules=["*"])
    with pytest.raises(TargetError, match="exclude_modules: 'qvk' matches nothing; did you mean"):
        adapted(tiny_vit(), exclude_modules=["qvk"])
    with pytest.raises(TargetError, match="finds no adaptable layer in ReLU"):
        adapted(nn.ReLU())
    with pytest.raises(TargetError, match="trainable: 'nroms' matches no module"):
        adapted(tiny_vit(), trainable=["nroms"])
    with pytest.raises(TargetError, match="rank_pattern: 'qvk' matches none"):
        adapted(tiny_vit(), rank_pattern={"qvk": 3})


def test_rank_larger_than_the_layer_allows():
    model = nn.Sequential(nn.Linear(64, 3), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(
        ConfigError, match=r"0\.weight: rank 20, at most 3\n.*1\.weight: rank 20, at most 8"
    ):
        adapted(model, rank=20, target_modules="all")
    assert not any(".lora" in n for n, _ in model.named_modules()), "the model was touched"
    report = inject(model, rank=20, target_modules="all", trainable=[], clamp_rank=True)
    assert [r.rank for r in report.rows] == [3, 8]


def test_rank_and_alpha_patterns():
    report = inject(
        tiny_vit(),
        rank=2,
        rank_pattern={"mlp.*": 4, "blocks.1.mlp.fc2": 1},
        alpha_pattern={"qkv": 3.0},
        trainable=[],
    )
    by_name = {r.module: (r.rank, r.alpha) for r in report.rows}
    assert by_name["blocks.0.mlp.fc1"] == (4, 16.0)
    assert by_name["blocks.1.mlp.fc2"] == (1, 16.0)
    assert by_name["blocks.0.attn.qkv"] == (2, 3.0)


def test_trainable_keywords():
    model = tiny_vit()
    report = inject(model, rank=1, trainable=["head", "norms", "biases", "pos_embed"])
    on = {n for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n}
    assert on == set(report.extras)
    assert {"head.weight", "norm.weight", "blocks.0.attn.qkv.bias", "pos_embed"} <= on
    assert "blocks.0.attn.qkv.weight" not in on
    convnext = timm.create_model("test_convnext", num_classes=3)  # NormMlpClassifierHead is no norm
    extras = inject(convnext, rank=1, trainable=["norms"]).extras
    assert {n for n in extras if n.startswith("head")} == {"head.norm.weight", "head.norm.bias"}


def pruned() -> nn.Module:
    return nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 2)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))


def integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            "parametrised by _SpectralNorm",
        ),
        (pruned, "computed by a forward hook"),
        (integers, "factors need a floating-point weight"),
        (lambda: nn.LazyLinear(4), "it is lazy and has no shape yet"),
        (lambda: nn.EmbeddingBag(4, 4, sparse=True), "a sparse gradient"),
    ],
)
def test_what_cannot_be_adapted_says_why(make, message):
    with pytest.raises(TargetError, match=message):
        adapted(nn.Sequential(make()), target_modules="0")


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as in GPT-2 of transformers."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(into, out)),
            nn.Parameter(torch.zeros(out)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Packed(nn.Module):
    """A quantised layer, as torchao's or bitsandbytes' own classes are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T


def packed_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        quantise(layer)
    return model


def test_a_packed_weight_is_refused_and_another_base_where_it_differs(tmp_path):
    model, x = packed_weights(), torch.randn(2, 4)
    model[1] = nn.Linear(4, 4)
    source = model(x)
    for targets in (["0"], "all"):
        with pytest.raises(TargetError, match=r"0.weight: weight is a PackedTensor, packed by"):
            inject(model, rank=1, target_modules=targets, trainable=[])
    inject(model, rank=1, target_modules=["1"], trainable=[])
    save_adapter(model, tmp_path / "file")
    remove(model)
    load_adapter(model, tmp_path / "file")
    remove(model)
    assert torch.equal(model(x), source)
    model[0] = packed_weights()[0]
    with pytest.raises(BaseMismatchError):
        load_adapter(model, tmp_path / "file")


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to take torchao
        return torch.ao.quantization.quantize_dynamic(tiny_vit(), {nn.Linear})


@pytest.mark.parametrize(
    ("make", "keyword", "adapts", "without", "why"),
    [
        (quantised, "auto", ["patch_embed.proj"], "blocks.0.attn.qkv", "quantised"),
        (
            lambda: nn.Sequential(nn.Embedding(4, 4), Conv1D(4, 4), nn.Linear(4, 2)),
            "all",
            ["0", "2"],
            "1",
            "Conv1D: no known kind of layer",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), Packed()), "all", ["0"], "1", "Packed: quantised"),
    ],
)
def test_keywords_say_what_they_leave_out_and_why(make, keyword, adapts, without, why):
    model = make()
    with pytest.warns(UserWarning, match=f'"{keyword}" adapts .* leaves {without}.*{why}'):
        report = inject(model, rank=1, target_modules=keyword, trainable=[])
    assert [row.module for row in report.rows] == adapts
    assert why in report.left_out[without]
    assert "left out" in str(report)
    remove(model)
    # Whoever names it in a choice of their own is not told.
    inject(
        model, rank=1, target_modules=keyword, trainable=[], exclude_modules=list(report.left_out)
    )
    with pytest.raises(TargetError, match="cannot be adapted"):
        inject(model, rank=1, target_modules=[without], trainable=[], name="other")


def test_the_report_reads_well_at_80_columns():
    text = str(inject(tiny_vit(), rank=2))
    assert "blocks.0.attn.qkv" in text
    assert "factorised" in text
    assert "head.weight" in text
    assert max(map(len, text.splitlines())) <= 80
