"""Translation: grammar, subwords, translator, decoding, adapters, memory, self-training."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
from torch import nn

from lora_lightning import LoRACallback, LoRAConfig, inject, merge, remove, unmerge, verify
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.targets import select
from lora_lightning.text.decoding import greedy
from lora_lightning.text.parallel import Pair, ParallelData, TextBatch, held_out, read_pairs
from lora_lightning.text.self_training import PseudoTranslationCallback
from lora_lightning.text.subwords import BEGIN, END, PAD, UNKNOWN, Subwords
from lora_lightning.text.synthetic.register_words import GENDERS, LEXICON, SOURCE, STEMS
from lora_lightning.text.synthetic.registers import DOMAINS, Grammar, registers
from lora_lightning.text.translation import Translated, Translation
from lora_lightning.text.translation_guard import TranslationGuard, TranslationLimits
from lora_lightning.text.translation_memory import TranslationMemory
from lora_lightning.text.translators import Translator, load_translator, save_translator
from tests.helpers.files import rewrite
from tests.helpers.training import randomise, trainer

SUBWORDS = Subwords.learn(["ab ba ab", "xy yx"], merges=4)
PAIRS = [Pair("ab ba", "xy yx"), Pair("ba", "yx"), Pair("ab ab ba ab", "xy")]


def translator(**sizes):
    torch.manual_seed(0)
    given = {"dim": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 12, **sizes}
    return Translator(SUBWORDS, **given).eval()


def adapted(**config):
    """A translator whose factors are all alive."""
    model = translator()
    inject(model, LoRAConfig(rank=2, target_modules="all", **config))
    randomise(model, 0.3)
    return model


def batch(*pairs):
    return TextBatch.of(pairs or PAIRS, SUBWORDS)


# ---- the grammar ------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_sentences_and_none_twice():
    found = registers(60, 20, 10, seed=3)
    assert found == registers(60, 20, 10, seed=3)
    assert found != registers(60, 20, 10, seed=4)
    sentences = [p.source for p in found]
    assert len(sentences) == len(set(sentences)) == 60 + 10 + 6 * (20 + 10)
    assert {p.domain for p in found} == {SOURCE, *DOMAINS}


def test_a_domain_is_the_same_whichever_others_are_asked_for():
    alone, all_ = registers(5, 20, 5, domains=("medical-2",)), registers(5, 20, 5)
    mine = [[p for p in found if p.domain == "medical-2"] for found in (alone, all_)]
    assert len(set(mine[0]) & set(mine[1])) >= 24


def test_a_clause_is_what_the_documentation_says():
    """The example of the module's docstring, word by word."""
    words = {w.forms[0]: w for kind in LEXICON[SOURCE].values() for w in kind}
    man, old, dog, see = (words[w] for w in ("man", "old", "dog", "see"))
    wanted = (
        f"{STEMS['yesterday']} {man.stem}{man.gender}ne {old.stem}{man.gender}ne "
        f"ke {dog.stem}{dog.gender}m na{see.stem}u{GENDERS[man.gender]}sh"
    )

    class Scripted:
        """A generator that draws what the sentence needs."""

        def __init__(self, numbers, indices, choices):
            self.numbers, self.indices, self.choices = iter(numbers), iter(indices), iter(choices)

        def random(self):
            return next(self.numbers)

        def integers(self, high):
            return next(self.indices)

        def choice(self, options):
            return next(self.choices)

    usual, place = LEXICON[SOURCE], lambda kind, word: LEXICON[SOURCE][kind].index(word)
    drawn = Scripted(
        # word's register, adjective?, its register, plural?, definite?; then the object's; the
        # verb's register, no place, a time, no question, negated
        [1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0.4, 1, 1, 0],
        [place("nouns", man), place("adjectives", old), place("nouns", dog), place("verbs", see)],
        ["yesterday"],
    )
    assert usual["verbs"][place("verbs", see)] is see
    assert Grammar().pair(drawn) == ("the old men did not see a dog yesterday", wanted)


def test_a_sense_changes_with_the_register_and_nothing_else():
    def stems(domain, form):
        grammar = Grammar(domain)
        kinds = [*grammar._usual.values(), *grammar._own.values()]
        return {w.stem for kind in kinds for w in kind if w.forms[0] == form}

    everyday = stems(SOURCE, "line")
    assert len(everyday) == 1 == len(stems("nautical-2", "line"))
    assert stems("nautical-1", "line") == everyday == stems("medical-3", "line")
    assert stems("nautical-2", "line") == stems("nautical-3", "line") != everyday
    assert stems("nautical-3", "dog") == stems(SOURCE, "dog")


def test_patterns_of_a_register_come_with_the_third_severity():
    def ends(domain, ending):
        pairs = registers(1, 200, 1, domains=(domain,))
        return fmean(p.target.endswith(ending) for p in pairs if p.domain == domain)

    assert ends("medical-3", " vu") > 0.05
    assert ends("medical-2", " vu") == ends("medical-1", " vu") == 0


def test_a_register_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"no register 'naval-1'; there are everyday, nautical-1"):
        Grammar("naval-1")


# ---- text as numbers --------------------------------------------------------------------------


def test_subwords_give_any_known_text_back():
    learnt = Subwords.learn(["low lower lowest", "new newer"], merges=6)
    for text in ("low newest", "wool", "lower  new"):
        assert learnt.decode(learnt.encode(text)) == " ".join(text.split())
    assert len(learnt.encode("low")) == 2  # the word, and the end
    assert Subwords.loads(learnt.dumps()).encode("lowest new") == learnt.encode("lowest new")
    assert UNKNOWN in learnt.encode("lox")
    assert learnt.decode([BEGIN, *learnt.encode("low"), *learnt.encode("new")]) == "low"


def test_a_text_cannot_spell_a_special_piece():
    learnt = Subwords.learn(["a<s> a<s> <pad>"], merges=50)
    assert not {PAD, BEGIN, UNKNOWN} & set(learnt.encode("a<s> <pad>"))
    assert learnt.decode(learnt.encode("a<s> <pad>")) == "a<s> <pad>"


def test_words_are_left_out_but_never_all():
    data = ParallelData(SUBWORDS, PAIRS * 8, dropped=0.9, batch_size=24, seed=1)
    [noisy] = data.train_dataloader()
    lengths = [len(p.source.split()) for p in noisy.pairs]
    assert min(lengths) >= 1
    assert sum(lengths) < sum(len(p.source.split()) for p in PAIRS * 8)
    assert [p.source for p in PAIRS] == ["ab ba", "ba", "ab ab ba ab"]


def test_pairs_are_read_and_held_out(tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [f"a{i}\tb{i}\tnews" for i in range(5)] + ["a0\tc\tlaw", "d\te\tlaw"]
    path.write_text("source\ttarget\tdomain\n" + "\n".join(rows) + "\n")
    found = held_out(read_pairs(path), 1, seed=0)
    sides = {s: {p.source for p in found if p.split == s} for s in ("train", "test")}
    assert not sides["train"] & sides["test"]
    assert {p.domain for p in found if p.split == "test"} == {"news", "law"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source\ttarget\tdomain\na\t\tx\n", "line 2: nothing in 'target'"),
        ("source\ttarget\tdomain\tsplit\na\tb\tx\tdev\n", "line 2: 'split' must be train or test"),
        ("from\tto\na\tb\n", "no column 'source' or 'target', only 'from' or 'to'"),
        ("source\ttarget\tdomain\n", "has no rows"),
    ],
)
def test_tables_of_pairs_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_a_domain_needs_sentences_to_learn():
    with pytest.raises(DataError, match="law has 2 different sentences, which leaves none"):
        held_out([Pair("a", "b", "law"), Pair("c", "d", "law")], 2)


# ---- the translator ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [translator, adapted])
def test_padding_and_later_pieces_change_nothing(make):
    model = make()
    long, short = batch(), batch(PAIRS[1])
    size, pieces = short.source.shape[1], short.target.shape[1]
    assert long.source.shape[1] > size
    with torch.no_grad():
        together = model(long.source, long.target)
        alone = model(short.source, short.target)
        cut = model(long.source, long.target[:, :2])
    assert torch.allclose(together[1, :pieces], alone[0], atol=1e-5)
    assert torch.allclose(together[:, :2], cut, atol=1e-5)
    changed = long.target.clone()
    changed[:, 2:] = END
    with torch.no_grad():
        assert torch.allclose(model(long.source, changed)[:, :2], cut, atol=1e-5)


def test_the_loss_is_the_mean_over_pieces_that_are_there():
    task, pairs = Translation(translator(), label_smoothing=0.0), batch()
    with torch.no_grad():
        log_probs = task(pairs.source, pairs.target[:, :-1]).log_softmax(dim=2)
    by_hand = [
        -log_probs[i, t, pairs.target[i, t + 1]].item()
        for i in range(3)
        for t in range(int((pairs.target[i] != PAD).sum()) - 1)
    ]
    assert task.loss(pairs).item() == pytest.approx(fmean(by_hand), rel=1e-5)


@pytest.mark.parametrize("make", [translator, adapted])
def test_greedy_decoding_is_the_whole_decoder_piece_by_piece(make):
    model, source = make(), batch().source
    pieces, likely = greedy(model, source, most=9)
    target = torch.full((3, 1), BEGIN)
    total = torch.zeros(3)
    with torch.no_grad():
        for _ in range(pieces.shape[1]):
            log_probs = model(source, target)[:, -1].log_softmax(dim=1)
            value, best = log_probs[:, END:].max(dim=1)
            open_ = (target[:, -1] != END) & (target[:, -1] != PAD)
            total += torch.where(open_, value, 0.0)
            target = torch.cat([target, torch.where(open_, best + END, PAD)[:, None]], dim=1)
    assert torch.equal(target[:, 1:], pieces)
    assert torch.allclose(likely, total / (pieces != PAD).sum(dim=1), atol=1e-5)


def test_greedy_decoding_by_hand():
    """A head that always says the same piece, and one that ends at once."""
    model = translator()
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.zeros(len(SUBWORDS))
    model.head.bias.data[5] = 2.0
    pieces, likely = greedy(model, batch().source, most=4)
    assert pieces.tolist() == [[5] * 4] * 3
    wanted = 2 - math.log(len(SUBWORDS) - 1 + math.exp(2))
    assert likely.tolist() == pytest.approx([wanted] * 3)
    model.head.bias.data[END] = 9.0
    assert greedy(model, batch().source)[0].tolist() == [[END]] * 3
    texts = [t.text for t in Translation(model).translate(batch())]
    assert texts == [""] * 3


def test_it_learns_three_sentences(tmp_path):
    torch.manual_seed(0)
    task = Translation(translator(dim=16, dropout=0.0).train(), 1e-2, label_smoothing=0.0)
    data = ParallelData(SUBWORDS, PAIRS, PAIRS, batch_size=3)
    runner = trainer(tmp_path, max_epochs=60)
    runner.fit(task, datamodule=data)
    [found] = runner.predict(task, datamodule=data)
    assert [t.text for t in found] == [p.target for p in PAIRS]
    [scores] = runner.test(task, datamodule=data, verbose=False)
    assert 0 <= scores["test_bleu"] <= 1


def test_the_file_is_the_model(tmp_path):
    model, pairs = translator(), batch()
    save_translator(model, tmp_path / "model.safetensors")
    again = load_translator(tmp_path / "model.safetensors")
    assert torch.equal(model(pairs.source, pairs.target), again(pairs.source, pairs.target))
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    for name, message in (("other", "damaged"), ("gone", "no translator's file")):
        with pytest.raises(ConfigError, match=message):
            load_translator(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["settings"].update(dim=4096), r"settings ask for \(\d+, 4096\)"),
        (lambda header: header["settings"].update(num_layers=0), r"settings\.num_layers"),
        (lambda header: header.update(subwords="[" * 99_999), "garbles subwords"),
        (lambda header: header.update(subwords='{"x": 1}'), "garbles subwords"),
        (lambda header: header.update(subwords='{"characters": [1], "merges": 2}'), "garbles"),
        (lambda header: header.update(subwords=3), "subwords"),
    ],
)
def test_a_file_whose_values_cannot_be_is_refused(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_translator(translator(), path)
    rewrite(path, lambda tensors, header: change(header), key="translator")
    with pytest.raises(ConfigError, match=message):
        load_translator(path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: translator(dim=9), "dim must be even and a multiple of num_heads; got dim=9"),
        (lambda: Translation(translator(), label_smoothing=1.0), "label_smoothing must lie in"),
        (lambda: TranslationMemory(translator(), batch(), neighbours=0), "neighbours"),
        (lambda: TranslationMemory(translator(), batch(), weight=2.0), "weight must lie in"),
        (lambda: TranslationMemory(translator(), batch(), temperature=0.0), "temperature"),
    ],
)
def test_values_that_cannot_be(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


# ---- adapters on it ---------------------------------------------------------------------------


def test_auto_adapts_encoder_and_decoder_and_no_head():
    found = {t.name for t in select(translator(), LoRAConfig())}
    layers = [f"transformer.{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)]
    own = {
        f"{layer}.{part}"
        for layer in layers
        for part in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    }
    crossed = {f"{layer}.multihead_attn{p}" for layer in layers[2:] for p in ("", ".out_proj")}
    assert found == own | crossed


@pytest.mark.parametrize("targets", ["auto", "all"])
def test_adapters_work_merge_and_come_off(targets):
    model, pairs = translator(), batch()
    arguments = pairs.source, pairs.target
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = model(*arguments)
    inject(model, LoRAConfig(rank=2, target_modules=targets))
    verify(model, arguments)
    randomise(model, 0.3)
    # Dropout aside, training and the fused path of eval agree, and so do they merged.
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.p = module.dropout = 0.0
    trained = model.train()(*arguments)
    with torch.no_grad():
        fast = model.eval()(*arguments)
        merge(model)
        merged = model(*arguments)
        unmerge(model)
    assert not torch.allclose(fast, source, atol=1e-2)
    assert torch.allclose(trained, fast, atol=1e-4)
    assert torch.allclose(merged, fast, atol=1e-4)
    remove(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert type(model.transformer) is nn.Transformer


# ---- the memory -------------------------------------------------------------------------------


def test_a_memory_knows_what_it_holds():
    model, pairs = translator(), batch()
    known = TranslationMemory(model, pairs, neighbours=1, weight=1.0)
    hidden = model.hidden(pairs.source, pairs.target[:, :-1]).detach()
    log_probs = torch.zeros(3, len(SUBWORDS)).log_softmax(dim=1)
    for t in range(2):
        said = known(hidden[:, t], log_probs).argmax(dim=1)
        assert said.tolist() == pairs.target[:, t + 1].tolist()
    silent = TranslationMemory(model, pairs, weight=0.0)(hidden[:, 0], log_probs)
    assert torch.allclose(silent, log_probs, atol=1e-6)
    mixed = TranslationMemory(model, pairs, neighbours=99, weight=0.3)(hidden[:, 0], log_probs)
    assert torch.allclose(mixed.exp().sum(dim=1), torch.ones(3), atol=1e-5)


# ---- without translations ---------------------------------------------------------------------


def teach(tmp_path, own, learning_rate=1e-3, **settings):
    task = Translation(translator().train(), learning_rate, 0.0)
    adapter = LoRACallback(
        rank=1, target_modules="all", trainable=[], output_dir=tmp_path, verify=False
    )
    given = {"max_steps": 4, "max_epochs": -1, "reload_dataloaders_every_n_epochs": 1, **settings}
    runner = trainer(tmp_path, adapter, own, **given)
    runner.fit(task, datamodule=own.data)
    return task


SENTENCES = ["ab", "ba ab", "ab ab", "ba", "ba"]


def test_each_round_learns_more_sentences(tmp_path):
    own = PseudoTranslationCallback(
        SENTENCES, SUBWORDS, keep=[0.5, 1.0], limits=None, batch_size=2, dropped=0.0
    )
    task = teach(tmp_path, own, max_steps=3)
    assert own.termination_condition_ == "all rounds done"
    assert [r.index for r in own.history_] == [0, 1, 2]
    assert own.accepted_ == 2
    assert [r.labelled for r in own.history_] == [None, 2, 4]
    assert set(own.source_) == set(own.translations_) == set(SENTENCES)
    found = task.eval().translate(batch(*map(Pair, own.sentences)))
    assert [t.text for t in found] == [own.translations_[s].text for s in own.sentences]
    changed = {s for s in SENTENCES if own.source_[s].text != own.translations_[s].text}
    assert set(own.changed_in_) == changed


def test_an_alarm_brings_the_source_back(tmp_path):
    limits = TranslationLimits(confidence=0.0)
    own = PseudoTranslationCallback(
        SENTENCES, SUBWORDS, keep=[1.0] * 3, limits=limits, batch_size=2
    )
    task = teach(tmp_path, own, learning_rate=50.0, max_steps=6)
    assert own.accepted_ == 0
    assert own.termination_condition_.startswith("alarm in round 1")
    pairs = batch()
    before = translator()(pairs.source, pairs.target)
    now = task.model.eval()(pairs.source, pairs.target)
    assert torch.allclose(before, now, atol=1e-6)


def test_nothing_is_trained_by_default(tmp_path):
    own = PseudoTranslationCallback(SENTENCES, SUBWORDS, batch_size=2)
    task = teach(tmp_path, own, max_steps=6)
    assert task.trainer.global_step == 0
    assert own.keeps_source
    assert [r.index for r in own.history_] == [0]
    why = own.termination_condition_
    assert why.startswith("nothing is trained: by its own translations a translator")
    assert why.endswith("(limits=TranslationLimits(confidence=0) trains all the same)")


def said(**texts):
    return {s: Translated(s, text, -0.1) for s, text in texts.items()}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "xy yx", "b": "xy"}, None),
        ({"a": "xy", "b": ""}, "0.33 times as many words as the source, outside 0.5 to 1.25"),
        ({"a": "xy yx xy yx", "b": "xy"}, "1.67 times as many words"),
        ({"a": "yz yz", "b": "xy"}, "33% of the words it writes are known, below 100%"),
        ({"a": "qq qqq", "b": "q"}, "agreement with the source's translations is"),
    ],
)
def test_the_guard_compares_with_the_source(texts, message):
    guard = TranslationGuard(
        said(a="xy yx", b="xy"), TranslationLimits(agreement=0.3), {"xy", "yx"}
    )
    verdict = guard.check(said(**texts))
    assert verdict.accepted == (message is None)
    assert message is None or any(message in alarm for alarm in verdict.alarms)


def test_what_it_cannot_work_with_is_said(tmp_path):
    own = PseudoTranslationCallback(SENTENCES, SUBWORDS)
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs=1"):
        teach(tmp_path, own, reload_dataloaders_every_n_epochs=0)
    with pytest.raises(DataError, match="the target is empty"):
        PseudoTranslationCallback([], SUBWORDS)
    for settings, message in (({"keep": [1.5]}, "keep"), ({"dropped": 1.0}, "dropped")):
        with pytest.raises(ConfigError, match=message):
            PseudoTranslationCallback(SENTENCES, SUBWORDS, **settings)
    silent = translator()
    silent.head.bias.data[END] = 99.0
    quiet = PseudoTranslationCallback(SENTENCES, SUBWORDS)
    runner = trainer(tmp_path, quiet, max_steps=1, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(DataError, match="nothing is written for any of the 4 sentences"):
        runner.fit(Translation(silent.train()), datamodule=quiet.data)
