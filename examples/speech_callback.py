"""Speech: adapt a recogniser to a voice with a few transcribed recordings."""

import lightning
import numpy
import soundfile

from lora_lightning import LoRACallback
from lora_lightning.speech import CTCRecognition, SpeechData, Utterance, load_recogniser

RATE = 16000


def recordings(count: int) -> list[Utterance]:
    """Tones that stand for a voice. Replace by `load_utterances("alice/")`: audio beside .txt."""
    time = numpy.arange(RATE) / RATE
    found = []
    for i in range(count):
        hertz, word = ((220, "one"), (440, "seven"))[i % 2]
        sound = 0.1 * numpy.sin(2 * numpy.pi * hertz * time * (1 + i / 100))
        soundfile.write(f"{i}.wav", sound, RATE)
        found.append(Utterance(f"{i}.wav", text=word, speaker="alice"))
    return found


lightning.seed_everything(0)
utterances = recordings(8)
data = SpeechData(train=utterances[:6], validation=utterances[6:], sample_rate=RATE)

# The recogniser that the package brings. A torchaudio model works in its place:
# CTCRecognition(bundle.get_model(), Labels(bundle.get_labels())).
task = CTCRecognition(load_recogniser("package"), learning_rate=3e-3)

lora = LoRACallback(rank=4, output_dir="adapters")
trainer = lightning.Trainer(
    max_epochs=4,
    accelerator="cpu",
    callbacks=[lora],
    inference_mode=False,  # so that `validate` may come before `fit`
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
before = trainer.validate(task, data, verbose=False)[0]
trainer.fit(task, data)
after = trainer.validate(task, data, verbose=False)[0]
for name, value in after.items():
    print(f"{name}: {before[name]:.2f} before, {value:.2f} after")
print(f"the voice, in {lora.adapter_path_.stat().st_size // 1000} kB: {lora.adapter_path_}")
