"""Every model of torchaudio.models at a tiny size, each with inputs, as (make, inputs) pairs."""

from __future__ import annotations

import warnings

import torch
import torchaudio.models as ta
from torch import nn

from lora_lightning.model import probing

_WAV2VEC2 = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(8, 10, 5), (8, 4, 4), (8, 4, 4)], "extractor_conv_bias": False,
    "encoder_embed_dim": 16, "encoder_projection_dropout": 0.1, "encoder_pos_conv_kernel": 4,
    "encoder_pos_conv_groups": 2, "encoder_num_layers": 2, "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 24,
    "encoder_ff_interm_dropout": 0.1, "encoder_dropout": 0.1, "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.1, "aux_num_out": 7,
}  # fmt: skip
_LARGE = {
    "extractor_mode": "layer_norm",
    "extractor_conv_bias": True,
    "encoder_layer_norm_first": True,
}
_HUBERT = {
    "mask_prob": 0.5, "mask_selection": "static", "mask_other": 0.0, "mask_length": 2,
    "no_mask_overlap": False, "mask_min_space": 1, "mask_channel_prob": 0.0,
    "mask_channel_selection": "static", "mask_channel_other": 0.0, "mask_channel_length": 2,
    "no_mask_channel_overlap": False, "mask_channel_min_space": 1, "skip_masked": False,
    "skip_nomask": False, "num_classes": 5, "final_dim": 6, "feature_grad_mult": None,
}  # fmt: skip
RNNT = {
    "input_dim": 8, "encoding_dim": 12, "num_symbols": 9, "segment_length": 8,
    "right_context_length": 4, "time_reduction_input_dim": 4, "time_reduction_stride": 2,
    "transformer_num_heads": 2, "transformer_ffn_dim": 16, "transformer_num_layers": 2,
    "transformer_dropout": 0.1, "transformer_activation": "gelu",
    "transformer_left_context_length": 6, "transformer_max_memory_size": 0,
    "transformer_weight_init_scale_strategy": "depthwise", "transformer_tanh_on_mem": True,
    "symbol_embedding_dim": 10, "num_lstm_layers": 2, "lstm_layer_norm": True,
    "lstm_layer_norm_epsilon": 1e-3, "lstm_dropout": 0.1,
}  # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) / 3


def wav2vec2(**settings) -> nn.Module:
    return ta.wav2vec2_model(**{**_WAV2VEC2, **settings})


def wavlm() -> nn.Module:
    return ta.wavlm_model(**_WAV2VEC2, encoder_num_buckets=8, encoder_max_distance=16)


def hubert_pretrain() -> nn.Module:
    settings = {k: v for k, v in _WAV2VEC2.items() if k != "aux_num_out"}
    return ta.hubert_pretrain_model(**settings, **_HUBERT)


def rnnt() -> nn.Module:
    return ta.emformer_rnnt_model(**RNNT)


def rnnt_inputs() -> tuple[torch.Tensor, ...]:
    targets = torch.tensor([[1, 2, 3], [4, 5, 0]])
    return noise(2, 20, 8), torch.tensor([16, 16]), targets, torch.tensor([3, 2])


def tacotron2() -> nn.Module:
    return ta.Tacotron2(
        n_mels=6, n_symbol=9, symbol_embedding_dim=8, encoder_embedding_dim=8,
        encoder_n_convolution=2, encoder_kernel_size=3, decoder_rnn_dim=10, attention_rnn_dim=10,
        attention_hidden_dim=6, attention_location_n_filter=4, attention_location_kernel_size=3,
        prenet_dim=8, postnet_n_convolution=2, postnet_kernel_size=3, postnet_embedding_dim=8,
        decoder_dropout=0.1,
    )  # fmt: skip


def tacotron2_inputs() -> tuple[torch.Tensor, ...]:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 1, 0]])
    return tokens, torch.tensor([5, 4]), noise(2, 6, 9), torch.tensor([9, 7])


def squim_objective() -> nn.Module:
    return ta.squim_objective_model(
        feat_dim=8, win_len=16, d_model=8, nhead=2, hidden_dim=8, num_blocks=2, rnn_type="LSTM",
        chunk_size=7,
    )  # fmt: skip


def squim_subjective() -> nn.Module:
    from torchaudio.models.squim.subjective import Predictor

    return ta.SquimSubjective(wav2vec2(aux_num_out=None), nn.Linear(16, 6), Predictor(12, 5))


def wav2letter() -> nn.Module:
    """Of few channels: it has up to 2,000, and no setting for them."""
    model, few = ta.Wav2Letter(7, "mfcc", 8), {250: 10, 2000: 12}
    for i, layer in enumerate(model.acoustic_model):
        if isinstance(layer, nn.Conv1d):
            into, out = (few.get(n, n) for n in (layer.in_channels, layer.out_channels))
            kept = layer.kernel_size, layer.stride, layer.padding
            model.acoustic_model[i] = nn.Conv1d(into, out, *kept)
    return model


MODELS = {
    "Wav2Vec2": (wav2vec2, lambda: (noise(2, 2400),)),
    "Wav2Vec2 large": (lambda: wav2vec2(**_LARGE), lambda: (noise(2, 2400),)),
    "WavLM": (wavlm, lambda: (noise(2, 2400),)),
    "HuBERT pretraining": (
        hubert_pretrain,
        lambda: (noise(2, 2400), torch.arange(58).view(2, 29) % 5, torch.tensor([2400, 2400])),
    ),
    "Conformer": (
        lambda: ta.Conformer(16, 2, 24, 2, 5, dropout=0.1),
        lambda: (noise(2, 12, 16), torch.tensor([12, 9])),
    ),
    "Conformer group norm": (
        lambda: ta.Conformer(16, 2, 24, 2, 5, use_group_norm=True, convolution_first=True),
        lambda: (noise(2, 12, 16), torch.tensor([12, 9])),
    ),
    "Emformer": (
        lambda: ta.Emformer(16, 2, 24, 2, 4, left_context_length=4, right_context_length=2),
        lambda: (noise(2, 14, 16), torch.tensor([12, 12])),
    ),
    "RNN-T": (rnnt, rnnt_inputs),
    "DeepSpeech": (lambda: ta.DeepSpeech(8, 16, 7, 0.1), lambda: (noise(2, 1, 10, 8),)),
    "Wav2Letter": (wav2letter, lambda: (noise(2, 8, 40),)),
    "Tacotron2": (tacotron2, tacotron2_inputs),
    "WaveRNN": (
        lambda: ta.WaveRNN([2, 2, 2], 16, 8, 2, 12, 12, 3, 6, 8, 8),
        lambda: (noise(2, 1, 32), noise(2, 1, 6, 6)),
    ),
    "ConvTasNet": (
        lambda: ta.ConvTasNet(2, 8, 12, 3, 8, 12, 2, 2),
        lambda: (noise(2, 1, 240),),
    ),
    "HDemucs": (
        lambda: ta.HDemucs(
            ["a", "b"], audio_channels=1, channels=8, nfft=256, depth=3, norm_starts=1,
            dconv_attn=1, dconv_lstm=1, norm_groups=2, dconv_init=0.3,
        ),
        lambda: (noise(1, 1, 2048),),
    ),
    "SQUIM objective": (squim_objective, lambda: (noise(2, 800),)),
    "SQUIM subjective": (squim_subjective, lambda: (noise(2, 2400), noise(2, 2400).flip(0))),
}  # fmt: skip


def positional(model: nn.Module, inputs: tuple) -> object:
    """All inputs, also those that the model could do without."""
    return model(*inputs)


def run(model: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    return probing.run(model, inputs, forward=positional)


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model in eval mode with the same random weights every time, and its inputs."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    return model, inputs()
