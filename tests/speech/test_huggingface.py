"""Recognisers of the library transformers, from a manifest to an adapter file and back."""

import copy

import pytest
import torch
from torchaudio.models.wav2vec2.utils import import_huggingface_model

from lora_lightning import LoRACallback, load_adapter
from lora_lightning.errors import ConfigError
from lora_lightning.speech.data.manifests import load_utterances, write_manifest
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.huggingface import HuggingFaceCTC
from tests.helpers.speech import sounds, written
from tests.helpers.training import trainer

# Importing transformers takes seconds.
pytestmark = pytest.mark.slow
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}
SIZES = {
    "vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


def original(name, norm="layer"):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")
    sizes = {**SIZES, "feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCTC")(config(**sizes)).eval()


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "WavLM"])
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_from_a_manifest_to_an_adapter_and_back(name, norm, tmp_path):
    manifest = write_manifest(
        tmp_path / "m.jsonl", written(tmp_path, sounds(0.1, 0.2, 0.15), text=lambda i: "ab a"[i:])
    )
    model = HuggingFaceCTC(original(name, norm), VOCABULARY)
    base = copy.deepcopy(model)
    data = SpeechData(train=load_utterances(manifest), max_batch=2)
    adapter = LoRACallback(rank=2, target_modules=["*q_proj", "*v_proj"], output_dir=tmp_path)
    trainer(tmp_path, adapter, max_steps=3, max_epochs=-1).fit(
        CTCRecognition(model.train(), learning_rate=1e-2), data
    )
    waveforms = torch.nn.utils.rnn.pad_sequence(sounds(0.1, 0.2), batch_first=True)
    given = waveforms, torch.tensor([1600, 3200])
    with torch.no_grad():
        before = base.eval()(*given)[0]
        load_adapter(base, adapter.adapter_path_)
        after, frames = base.eval()(*given)
        assert torch.equal(after, model.eval()(*given)[0])
        assert not torch.allclose(after, before)
        if norm == "layer":  # padding changes nothing
            alone = base(waveforms[:1, :1600])[0][0]
            torch.testing.assert_close(after[0, : int(frames[0])], alone, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_through_torchaudio(tmp_path):
    source = original("Wav2Vec2")
    ours = HuggingFaceCTC(source, VOCABULARY, normalize=False)
    theirs = import_huggingface_model(source).eval()
    waveforms = torch.nn.utils.rnn.pad_sequence(sounds(0.1, 0.2), batch_first=True)
    lengths = torch.tensor([1600, 3200])
    with torch.no_grad():
        (a, n), (b, m) = ours(waveforms, lengths), theirs(waveforms, lengths)
    assert torch.equal(n, m)
    for x, y, count in zip(a, b, n, strict=True):
        torch.testing.assert_close(x[:count], y[:count], atol=1e-4, rtol=0)
    items = written(tmp_path, sounds(0.1, 0.2), text=lambda i: "ab")
    adapter = LoRACallback(rank=2, target_modules=["*q_proj"], output_dir=tmp_path)
    task = CTCRecognition(theirs.train(), ours.labels)
    trainer(tmp_path, adapter, max_steps=2, max_epochs=-1).fit(task, SpeechData(train=items))
    assert adapter.adapter_path_.exists()


@pytest.mark.filterwarnings("ignore")
def test_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="number its symbols from 0"):
        HuggingFaceCTC(original("Wav2Vec2"), {"a": 1})
