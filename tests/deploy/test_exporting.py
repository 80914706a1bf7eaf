"""Exported models give the outputs of the model, in the programs of others."""

import copy
import json

import pytest
import timm
import torch
from torch import nn

from lora_lightning import inject, load_adapter, merge
from lora_lightning.deploy import export
from lora_lightning.errors import AdapterFileError, ConfigError, TargetError, VerificationError
from lora_lightning.model.probing import difference
from tests.helpers.speech import wav2vec2
from tests.helpers.training import randomise

# Of torch's exporter and of the packages of others.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def pictures(number, side=32):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(number))


def network(name="test_vit", **options):
    size = {"img_size": 32, "patch_size": 8, "depth": 1} if name == "test_vit" else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **size).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("a", "b", "c")}
    base = copy.deepcopy(model)
    inject(model, rank=2, **options)
    randomise(model)
    with torch.no_grad():
        model.get_classifier().weight.add_(0.1)
    return base, model


@pytest.mark.parametrize(
    ("name", "merged"),
    # Merged, docs/story-deployment.md exports test_vit and compares it.
    [("test_vit", False), *(
        pytest.param(name, merged, marks=pytest.mark.slow)
        for name in ("test_vit", "test_convnext", "test_resnet") for merged in (True, False)
        if merged or name != "test_vit"
    )],
)  # fmt: skip
def test_onnx_takes_batches_of_any_size(name, merged, tmp_path):
    import onnxruntime

    _, model = network(name, target_modules="all")
    path = tmp_path / "model.onnx"
    found = export(model, path, "onnx", inputs=pictures(1), merged=merged)
    session = onnxruntime.InferenceSession(path)
    assert '"class_names": ["a", "b", "c"]' in session.get_modelmeta().custom_metadata_map["data"]
    (given,) = session.get_inputs()
    worst = {}
    for n in (1, 7, 64):
        x = pictures(n)
        (out,) = session.run(None, {given.name: x.numpy()})
        worst[n] = difference([torch.from_numpy(out)], [model(x)])
    print(f"{name}, {merged=}: {found.differences}, {worst}")
    assert max(worst.values()) <= 1e-5
    assert any("lora_A" in n for n, _ in model.named_parameters())  # it is as it was


def test_torch_export_takes_batches_of_any_size(tmp_path):
    _, model = network()
    for merged in (True, False):
        found = export(model, tmp_path / "m.pt2", "torch-export", inputs=pictures(2), merged=merged)
        files = {"data": ""}
        program = torch.export.load(tmp_path / "m.pt2", extra_files=files).module()
        for n in (1, 7, 64):
            assert difference([program(pictures(n))], [model(pictures(n))]) <= 1e-5
        assert '"class_names": ["a", "b", "c"]' in str(files["data"])
        assert any("lora_A" in key for key in program.state_dict()) is not merged
        print(f"torch-export, {merged=}: {found.differences}")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_loads_the_folder(name, tmp_path):
    _, model = network(name)
    found = export(model, tmp_path / "folder", "timm", inputs=pictures(2))
    loaded = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    merge(model)
    assert torch.equal(loaded(pictures(3)), model(pictures(3)))
    again = export(model, tmp_path / "again", "timm")  # merged, and not compared
    assert again.differences == {}
    written = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("folder", "again")]
    assert written[0] == written[1]
    (tmp_path / "plain").touch()
    modes = {f.stat().st_mode for f in (tmp_path / "folder").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    print(f"timm, {name}: {found.differences}")


@pytest.mark.parametrize("format", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_recogniser_takes_recordings_of_any_length(format, tmp_path):
    import onnxruntime

    model = wav2vec2(encoder_num_layers=1, extractor_conv_layer_config=[(8, 10, 80)]).eval()
    inject(model, rank=2, trainable=[])
    randomise(model)
    path, sound = tmp_path / "model", torch.randn(3, 11111)
    found = export(model, path, format, inputs=torch.randn(1, 16000), merged=False, free=(0, 1))
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        (given,) = session.get_inputs()
        out = torch.from_numpy(session.run(None, {given.name: sound.numpy()})[0])
    else:
        out = torch.export.load(path).module()(sound)[0]
    worst = difference([out], [model(sound)[0]])
    print(f"wav2vec 2.0, {format}: {found.differences}, {worst}")
    assert worst <= 1e-5


def test_a_recogniser_of_peft(tmp_path):
    model = wav2vec2().eval()
    inject(model, rank=2, trainable=[])
    randomise(model)
    found = export(model, tmp_path, "peft", inputs=torch.randn(2, 11111))
    assert max(found.differences.values()) == 0


def mixed():
    """All kinds of layers that PEFT has, two of them with one ending of their names."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return nn.ModuleDict({
        "words": nn.Embedding(9, 5), "conv": nn.Conv1d(5, 6, 3, padding=1, stride=2), "head": head,
        "attention": nn.MultiheadAttention(6, 2, batch_first=True), "0": nn.Linear(3, 3),
        "10": nn.Linear(3, 3),
    })  # fmt: skip


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = mixed()

    def forward(self, x):
        p = self.parts
        x = p["conv"](p["words"](x).transpose(1, 2)).transpose(1, 2)
        x = (x + p["attention"](x, x, x, need_weights=False)[0]).mean(1)
        return p["10"](p["0"](p["head"](x)))


@torch.no_grad()
def change(model):
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.add_(torch.randn_like(parameter) / 10)


WORDS = torch.arange(24).view(4, 6) % 9


@pytest.mark.parametrize(
    "options",
    [{}, {"exclude_modules": ["parts.attention"]}, {"scaling": "alpha/sqrt(r)"},
     {"xs": True, "rank": 2}, {"init": "pissa"},
     {"dora": True, "exclude_modules": ["parts.words", "parts.attention"]},
     {"rank_pattern": {"parts.0": 3}, "alpha_pattern": {"parts.0": 3.0}}],
    ids=lambda o: next(iter(o), "plain"),
)  # fmt: skip
def test_peft_loads_the_folder_and_we_load_it_back(options, tmp_path):
    model = Mixed().eval()
    base = copy.deepcopy(model)
    own = {"rank": 2, "alpha": 4.0, "target_modules": "all", "trainable": ["parts.head.1"]}
    left = ["parts.attention.out_proj", *options.get("exclude_modules", [])]
    inject(model, **{**own, **options, "exclude_modules": left})
    change(model)
    model.parts["head"][1].running_mean.add_(0.1)
    found = export(model, tmp_path / "peft", "peft", inputs=WORDS)
    load_adapter(base, tmp_path / "peft")
    back = difference([base(WORDS)], [model(WORDS)])
    worst = max(found.differences.values())
    print(f"peft, {options}: {worst}, back: {back}")
    assert max(worst, back) < 1e-6
    if options == {"exclude_modules": ["parts.attention"]}:
        assert max(worst, back) == 0


def test_a_folder_of_peft_is_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, x = network()[0], pictures(3)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["qkv", "proj", "fc1"], modules_to_save=["head"],
        rank_pattern={"fc1": 2}, alpha_pattern={r"blocks\.0.*proj": 5}, use_rslora=True,
        use_dora=True,
    )  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    theirs.eval().save_pretrained(tmp_path)
    report = load_adapter(base, tmp_path, name="theirs")
    found = difference([base(x)], [theirs(x)])
    print(f"from peft: {found}")
    assert found <= 1e-6
    assert {row.rank for row in report.rows} == {2, 4}
    assert set(report.extras) == {"head.weight", "head.bias"}


def settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "LORA alone"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"lora_bias": True}, "asks for lora_bias"),
        ({"r": 0}, "expected a whole number from 1"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
        ({"use_dora": True}, r"parts.attention, .*: DoRA of attention"),
    ],
)
def test_what_peft_computes_otherwise_is_not_read(change, message, tmp_path):
    model = Mixed()
    base = copy.deepcopy(model)
    inject(model, rank=2, trainable=[], target_modules=["parts.attention", "parts.0"])
    export(model, tmp_path, "peft")
    settings(tmp_path, **change)
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(base, tmp_path)
    assert type(base.parts["0"]) is nn.Linear


def test_a_damaged_folder_of_peft_is_refused(tmp_path):
    model = Mixed()
    base = copy.deepcopy(model)
    inject(model, rank=2, trainable=[], target_modules=["parts.attention", "parts.0"])
    export(model, tmp_path, "peft")
    with pytest.raises(AdapterFileError, match="which this model has not"):
        load_adapter(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    file = tmp_path / "adapter_config.json"
    before = file.read_text()
    file.write_text("[1]")
    with pytest.raises(AdapterFileError, match="expected a mapping"):
        load_adapter(base, tmp_path)
    file.write_text(before)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="a pickle"):
        load_adapter(base, tmp_path)


class Reader(nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("name", ["parts.attention.out_proj", "parts.attention"])
def test_a_projection_that_peft_ignores_or_adds_twice_is_not_read(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=[name], init_lora_weights=False)
    get_peft_model(Mixed(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="output's projection of an attention, which PEFT"):
        load_adapter(Mixed(), tmp_path)


def test_layers_that_peft_has_not_are_named(tmp_path):
    layers = nn.Conv1d(3, 3, 2, dilation=2), nn.Linear(3, 3), Reader(3, 3)
    model = nn.Sequential(*layers, nn.MultiheadAttention(4, 1, kdim=3))
    inject(model, rank=1, trainable=[], target_modules="all")
    with pytest.raises(TargetError, match=r"6 of 7") as error:
        export(model, tmp_path, "peft")
    for name in (
        "0.weight",
        "2.weight",
        "3.q_proj_weight",
        "dilation=(2,)",
        "weights of their own",
    ):
        assert name in str(error.value)
    assert not list(tmp_path.iterdir())
    alone = nn.Linear(3, 3)
    inject(alone, rank=1, trainable=[], target_modules="all")
    with pytest.raises(TargetError, match="the model itself"):
        export(alone, tmp_path, "peft")


class Fixed(nn.Module):
    """Whose graph is right for one number of items alone, or never."""

    def __init__(self, wrong=False):
        super().__init__()
        self.layer, self.wrong = nn.Linear(3, 3), wrong

    def forward(self, x):
        out = self.layer(x)
        if self.wrong:
            return out * (2 if torch.compiler.is_compiling() else 1)
        return out.view(2, 3) if len(x) == 2 else out


def test_what_cannot_be_exported_is_said(tmp_path):
    model, x = Fixed(), torch.randn(2, 3)
    with pytest.raises(ConfigError, match="Fixed cannot become a graph for inputs of any size"):
        export(model, tmp_path / "x.pt2", "torch-export", inputs=x)
    with pytest.raises(VerificationError, match="do not use it"):
        export(Fixed(wrong=True), tmp_path / "x.pt2", "torch-export", inputs=x)
    with pytest.raises(ConfigError, match="needs `inputs`"):
        export(model, tmp_path / "x.onnx", "onnx")
    with pytest.raises(ConfigError, match="unknown format 'onx'; did you mean 'onnx'"):
        export(model, tmp_path / "x.onnx", "onx")
    with pytest.raises(ConfigError, match="none of timm's models"):
        export(model, tmp_path / "x", "timm")
    with pytest.raises(ConfigError, match="no factors"):
        export(model, tmp_path / "x", "timm", merged=False)
