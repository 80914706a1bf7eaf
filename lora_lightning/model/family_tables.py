"""Tables of model families: the layers that `"auto"` adapts, and the layers of the head.

Patterns are those of `model.patterns`, read from the module that the table names: they
hold as well where that module is a part of another model.
"""

from __future__ import annotations

_VIT = ("attn.qkv", "attn.proj", "attn.[qkv]", "attn.[qkv]_proj", "attn.kv", "mlp.fc[12]",
        "mlp.fc1_[gx]", "mlp.w[12]")  # fmt: skip
_CONVNEXT = ("mlp.fc1", "mlp.fc2")
_MOBILE = ("conv_pw", "conv_pwl", "blocks.*.conv")
_RESNET = ("layer?.*.conv[123]",)

# Keyed by the module of timm.models that defines the class.
TIMM: dict[str, tuple[str, ...]] = {
    "beit": _VIT,
    "cait": _VIT,
    "convnext": _CONVNEXT,
    "crossvit": (*_VIT, "attn.w[qkv]"),
    "davit": _VIT,
    "deit": _VIT,
    "edgenext": (*_CONVNEXT, "xca.qkv", "xca.proj"),
    "efficientnet": _MOBILE,
    "eva": _VIT,
    "fastvit": (*_VIT, *_CONVNEXT),
    "focalnet": ("mlp.fc[12]", "modulation.f", "modulation.h", "modulation.proj"),
    "hiera": _VIT,
    "inception_next": _CONVNEXT,
    "maxxvit": (*_VIT, "conv1_1x1", "conv3_1x1"),
    "metaformer": _CONVNEXT,
    "mobilenetv3": _MOBILE,
    "mvitv2": _VIT,
    "naflexvit": _VIT,
    "nfnet": ("stages.*.conv1", "stages.*.conv3"),
    "pvt_v2": _VIT,
    "regnet": ("conv1.conv", "conv3.conv"),
    "repvit": ("mixer.*.c", "conv[12].c"),
    "resnet": _RESNET,
    "swin_transformer": (*_VIT, "downsample.reduction"),
    "swin_transformer_v2": (*_VIT, "downsample.reduction"),
    "swin_transformer_v2_cr": (*_VIT, "downsample.reduction"),
    "twins": _VIT,
    "vision_transformer": _VIT,
    "vision_transformer_relpos": _VIT,
    "vision_transformer_sam": _VIT,
    "xcit": _VIT,
}

_WAV2VEC2 = ("attention.[qkv]_proj", "attention.out_proj", "attention.attention",
             "feed_forward.*_dense")  # fmt: skip
_EMFORMER = ("attention.emb_to_query", "attention.emb_to_key_value", "attention.out_proj",
             "pos_ff.[14]")  # fmt: skip

# Keyed by the module below torchaudio.models that defines the class. Attention and feed-forward
# projections; in recurrent and convolutional models what mixes features. Never the extractor of
# features, a filter bank, a depthwise convolution or the last layer.
TORCHAUDIO: dict[str, tuple[str, ...]] = {
    "_hdemucs": ("rewrite", "dconv.layers.*.lstm", "dconv.layers.*.linear",
                 "dconv.layers.*.content", "dconv.layers.*.query", "dconv.layers.*.key",
                 "dconv.layers.*.proj"),
    "conformer": ("ffn[12].sequential.[14]", "self_attn", "self_attn.out_proj",
                  "conv_module.sequential.[05]"),
    "conv_tasnet": ("mask_generator.conv_layers.*.conv_layers.0", "res_out", "skip_out"),
    "deepspeech": ("fc[1-4].fc", "bi_rnn"),
    "emformer": _EMFORMER,
    "rnnt": (*_EMFORMER, "lstm_layers.*.x2g", "lstm_layers.*.p2g"),
    "squim.objective": ("row_rnn.*", "col_rnn.*", "self_attn", "self_attn.out_proj",
                        "linear[12]"),
    "squim.subjective": _WAV2VEC2,
    "tacotron2": ("encoder.lstm", "decoder.attention_rnn", "decoder.decoder_rnn",
                  "decoder.prenet.layers.*", "attention_layer.query_layer",
                  "attention_layer.memory_layer"),
    "wav2letter": (r"re:acoustic_model(\.1)?\.\d+",),  # not the layer that reads the waveform
    "wav2vec2.components": _WAV2VEC2,
    "wav2vec2.model": _WAV2VEC2,
    "wav2vec2.wavlm_attention": ("attention", "attention.out_proj"),
    "wavernn": ("rnn[12]", "fc", "fc[12]"),
}  # fmt: skip

# Keyed by the class below torch.nn. An encoder's layers and a decoder's count, though neither may
# hold half of the weights.
TORCH: dict[str, tuple[str, ...]] = {
    "Transformer": ("self_attn", "self_attn.out_proj", "multihead_attn",
                    "multihead_attn.out_proj", "linear[12]"),
}  # fmt: skip

# Each pattern names a layer of the head: the last that it matches. A family that is not here
# ends without one (an encoder, a synthesiser, a separator).
TORCHAUDIO_HEADS: dict[str, tuple[str, ...]] = {
    "deepspeech": ("out",),
    "rnnt": ("joiner.linear",),
    "squim.objective": ("branches.0.2.*", "branches.1.2.*", "branches.2.2.*"),
    "squim.subjective": ("predictor.att_pool_layer.linear2",),
    "wav2letter": ("acoustic_model.*",),
    "wav2vec2.model": ("aux", "logit_generator"),
    "wavernn": ("fc3",),
}
