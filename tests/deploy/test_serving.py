"""A service's answers are those of `load_adapter` and a batch of one; all else is said in words."""

import asyncio
import copy
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_lightning import load_adapter
from lora_lightning.cli import _parser, main
from lora_lightning.deploy import commands
from lora_lightning.deploy.adapter_folder import AdapterFolder
from lora_lightning.deploy.classifier_answers import ClassifierAnswers
from lora_lightning.deploy.intake import (
    Asked,
    Job,
    PictureIntake,
    RecordingIntake,
    Refused,
    asked,
    body_of,
)
from lora_lightning.deploy.recogniser_answers import RecogniserAnswers
from lora_lightning.deploy.service import Service
from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser
from lora_lightning.vision.data.pictures import Preparation
from lora_lightning.vision.named_classifier import NamedClassifier
from tests.helpers.audio_zoo import _WAV2VEC2
from tests.helpers.bank_cases import write
from tests.helpers.files import rewrite
from tests.helpers.speech import AB, conformer, sounds
from tests.helpers.training import tiny_vit

NAMES = ["a", None, "b", "c", "a", "b"]
CLASSES = ["car", "dog", "hut", "tie"]


def classifier(model=None):
    found = NamedClassifier("tiny", model or tiny_vit(), CLASSES, Preparation(32, crop=1.0), True)
    found.describe()
    return ClassifierAnswers(found)


def recogniser(model=None):
    model = (model or conformer()).eval()
    found = NamedRecogniser("tiny", model, getattr(model, "labels", AB), 16000)
    found.tell({})
    return RecogniserAnswers(found)


def group_norm():
    from torchaudio.models import wav2vec2_model

    torch.manual_seed(0)
    sizes = {k: 0.0 if "drop" in k else v for k, v in _WAV2VEC2.items()}
    return wav2vec2_model(**{**sizes, "aux_num_out": len(AB)})


def pictures(n):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (3, 32, 32), dtype=np.uint8) for _ in range(n)]


def recordings(n):
    lengths = [0.3, 0.5, 0.3, 0.42, 0.5, 0.61]
    return [sound.numpy() for sound in sounds(*lengths[:n])]


def alone(base, folder, name, item):
    """The output by a model that has this adapter alone."""
    model = copy.deepcopy(base.model)
    if name is not None:
        load_adapter(model, folder / f"{name}.safetensors")
    other = type(base)(type(base.base)(**{**vars(base.base), "model": model}))
    with torch.inference_mode():
        return other, other.outputs([item])[0]


def tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0][:, : int(output[1])]


@pytest.mark.parametrize(
    ("make", "items", "network"),
    [(classifier, pictures, None), (recogniser, recordings, None),
     (recogniser, recordings, group_norm)],
    ids=["pictures", "recordings", "padding matters"],
)  # fmt: skip
def test_each_item_of_a_batch_is_answered_by_its_own_adapter(make, items, network, tmp_path):
    base = make(network() if network else None)
    write(base.model, tmp_path)
    service = Service(base, AdapterFolder(tmp_path))
    jobs = [Job(Asked(n, 1), x) for n, x in zip(NAMES, items(len(NAMES)), strict=True)]
    answers = service.answer(jobs)
    with torch.inference_mode():
        outputs = dict(service._outputs(jobs))
    heard = set()
    for i, (name, item) in enumerate((job.asked.adapter, job.item) for job in jobs):
        other, output = alone(base, tmp_path, name, item)
        torch.testing.assert_close(tensor(outputs[i]), tensor(output), rtol=0, atol=1e-5)
        said = other.said(output, base.told({}), 1)
        assert answers[i].status == 200
        assert answers[i].body["adapter"] == name
        if make is classifier:
            (mine,), (theirs,) = answers[i].body["classes"], said["classes"]
            assert mine["class"] == theirs["class"] in CLASSES
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)
        else:
            assert answers[i].body["text"] == said["text"]
        heard.add(json.dumps(answers[i].body))
    assert len(heard) > 3  # the adapters make a difference
    groups = len(base.groups([job.item for job in jobs]))
    assert groups == (4 if network else 1)


def test_the_folder_is_followed(tmp_path):
    base = classifier()
    paths = write(base.model, tmp_path)
    service, (item,) = Service(base, AdapterFolder(tmp_path, seconds=0)), pictures(1)

    def ask(*names):
        return service.answer([Job(Asked(name, 4), item) for name in names])

    def expected(name):
        _, output = alone(base, tmp_path, name, item)
        return pytest.approx(sorted(output.tolist(), reverse=True), abs=1e-5)

    def given(answer):
        return [c["probability"] for c in answer.body["classes"]]

    first = ask("a", "b")[0]
    assert given(first) == expected("a")
    shutil.copy(paths["c"], tmp_path / "new.safetensors")
    shutil.copy(paths["c"], tmp_path / "a.safetensors")  # renewed in place
    paths["b"].unlink()
    renewed, gone, new = ask("a", "b", "new")
    assert given(renewed) == given(new) == expected("a") != given(first)
    assert gone == (404, {"detail": "there is no adapter 'b'"})
    assert "b" not in service.bank

    (tmp_path / "a.safetensors").write_bytes(paths["c"].read_bytes()[:-8])  # half copied
    rewrite(paths["c"], lambda t, header: header["data"].update(input_size=[3, 64, 64]))
    damaged, other, new = ask("a", "c", "new")
    assert damaged.status == other.status == 500
    assert damaged.body["detail"].startswith("the adapter 'a' cannot be used: a.safetensors is dam")
    assert "prepared as 64 pixels" in other.body["detail"]
    assert "give --size 64" in other.body["detail"]
    assert str(tmp_path) not in damaged.body["detail"] + other.body["detail"]
    assert given(new) == expected("new")
    rewrite(
        tmp_path / "new.safetensors", lambda t, header: header["data"].update(class_names=[*"wxyz"])
    )
    assert {c["class"] for c in ask("new")[0].body["classes"]} == {*"wxyz"}
    shutil.rmtree(tmp_path)
    assert [a.status for a in ask("a", None)] == [404, 200]
    with pytest.raises(AdapterFileError, match="no folder"):
        AdapterFolder(tmp_path)


def test_one_request_that_fails_harms_no_other_of_its_batch(tmp_path):
    base = recogniser()
    service = Service(base, AdapterFolder(tmp_path))
    good, bad = recordings(2)
    bad = np.full_like(bad, np.nan)  # decoding would have refused it
    answers = service.answer([Job(Asked(), good), Job(Asked(), bad), Job(Asked(), good)])
    assert [a.status for a in answers] == [200, 500, 200]
    assert "NaN" in answers[1].body["detail"]
    rate = {"sample_rate": 8000}
    with pytest.raises(ValueError, match="8000 Hz, and the model that is served 16000 Hz"):
        base.told(rate)


def body(kind="PNG", size=(40, 30), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def wav(seconds):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(8000 * seconds), np.float32), 8000, format="FLAC")
    return buffer.getvalue()


def test_bodies_are_decoded_in_memory_or_refused(tmp_path):
    picture, recording = PictureIntake(Preparation(32), 4), RecordingIntake(16000, 1.0)
    assert picture.read(body("JPEG")).shape == (3, 37, 37)
    assert len(recording.read(wav(0.5))) == 8000
    wrong = [
        (picture, body("EPS"), "the body is no PNG, JPEG, WEBP, BMP or TIFF picture"),
        (picture, body("GIF"), "the body is no PNG"),
        (picture, str(tmp_path).encode(), "the body is no PNG"),
        (picture, body()[:-30], "picture refused: cannot be read"),
        (picture, body(size=(10_000, 5001), mode="1"), "10000 × 5001 pixels, above 50,000,000"),
        (recording, wav(2.0), "recording refused: too long: 2.0 s, above 1 s"),
        (recording, wav(0.05), "recording refused: too short: 0.050 s, below 0.1 s"),
        (recording, b"#EXTM3U\n/etc/passwd\n", "recording refused: cannot be read: Format not"),
    ]
    for intake, given, said in wrong:
        with pytest.raises(Refused, match=said) as caught:
            intake.read(given)
        assert caught.value.status == 422
        assert " at 0x" not in str(caught.value)


def test_a_query_is_looked_up_and_never_guessed():
    known = {"a": 1}
    assert asked([("adapter", "a"), ("top", "3")], known, 4) == Asked("a", 3)
    assert asked([], known) == Asked(None, 1)
    for query, status, said in [
        ([("adapter", "../a")], 404, "there is no adapter '../a'"),
        ([("adapter", "")], 404, "there is no adapter ''"),
        ([("adpter", "a")], 422, "unknown parameter 'adpter'; did you mean 'adapter'"),
        ([("adapter", "a"), ("adapter", "a")], 422, "given twice"),
        ([("top", "5")], 422, "top must be a whole number from 1 to 4, got '5'"),
        ([("top", "-1")], 422, "top must be a whole number"),
        ([("top", "²")], 422, "top must be a whole number"),
    ]:
        with pytest.raises(Refused, match=said) as caught:
            asked(query, known, 4)
        assert caught.value.status == status


def test_a_body_is_read_no_further_than_it_may_be_long():
    read = []

    async def chunks(*sizes):
        for size in sizes:
            read.append(size)
            yield bytes(size)

    assert asyncio.run(body_of(chunks(3, 4), 7)) == bytes(7)
    for sizes, head, status in [
        ((4, 4, 4), {}, 413),
        ((1,), {"length": "8"}, 413),
        ((), {}, 422),
        ((1,), {"content_type": "multipart/form-data; boundary=x"}, 415),
    ]:
        read.clear()
        with pytest.raises(Refused) as caught:
            asyncio.run(body_of(chunks(*sizes), 7, **head))
        assert caught.value.status == status
        assert len(read) == (2 if status == 413 and not head else 0)


# ---- the server ------------------------------------------------------------------------------


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def call(url, content=None, **headers):
    """(status, body) of a request."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(url, content, headers), timeout=30) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def until_ready(server, url):
    while server.poll() is None:
        try:
            if call(f"{url}/health")[0] == 200:
                return
        except (URLError, ConnectionError):
            time.sleep(0.05)
    raise AssertionError(server.stdout.read())


def test_what_cannot_be_served_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    command = ["serve", "--model", "spoken", "--adapters", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "litserve", None)
    assert main(command) == 2
    assert "serve needs litserve: pip install 'lora-lightning[serve]'" in capsys.readouterr().err
    for wrong, said in [
        (["--capacity", "3"], "--capacity must be a whole number of at least 16, got 3"),
        (["--port", "80"], "--port must lie in [1024, 65535], got 80"),
        (["--max-seconds", "nan"], "--max-seconds must be above 0, got nan"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            commands._check(_parser().parse_args([*command, *wrong]))


def test_the_server_answers_by_name_and_refuses_in_words(tmp_path):
    pytest.importorskip("litserve", reason="the extra serve is not installed")
    import timm

    base = timm.create_model("test_vit", num_classes=4, depth=6).eval()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    folder, port = tmp_path / "adapters", free_port()
    folder.mkdir()
    write(base, folder, "ab")
    command = [sys.executable, "-m", "lora_lightning.cli", "serve", "--model", "test_vit"]
    command += ["--checkpoint", str(tmp_path / "base.safetensors"), "--adapters", str(folder)]
    command += ["--port", str(port), "--max-mb", "0.1", "--accelerator", "cpu"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "LORA_LIGHTNING_API_KEY": "unsaid"}, cwd=tmp_path,
    )  # fmt: skip
    url, key = f"http://127.0.0.1:{port}", {"X_API_Key": "unsaid"}
    try:
        until_ready(server, url)
        picture = body(size=(200, 160))
        status, said = call(f"{url}/predict?adapter=a&top=2", picture, **key)
        assert status == 200
        assert json.loads(said)["adapter"] == "a"
        assert len(json.loads(said)["classes"]) == 2
        for query, content, expected in [
            ("adapter=z", picture, (404, "there is no adapter 'z'")),
            ("", b"no picture", (422, "the body is no PNG")),
            ("", bytes(200_000), (413, "the body is too large")),
        ]:
            status, said = call(f"{url}/predict?{query}", content, **key)
            assert (status, json.loads(said)["detail"][: len(expected[1])]) == expected
        assert call(f"{url}/predict", picture)[0] == call(f"{url}/metrics")[0] == 401
        counts = call(f"{url}/metrics", **key)[1]
        for line in ('requests_total{status="413"} 1.0', "batch_sum 1.0", "adapters 2.0"):
            assert f"lora_lightning_{line}" in counts
    finally:
        server.send_signal(signal.SIGTERM)
        said, _ = server.communicate(timeout=60)
    assert server.returncode == 0, said
    assert "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "base.safetensors"]
