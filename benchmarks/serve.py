"""Load on `lora-lightning serve`: throughput, memory, and every answer against a batch of one.

    python benchmarks/serve.py              # 64 adapters, 32 clients, 10,000 requests: 15 minutes
    python benchmarks/serve.py --smoke --no-save

A server is started on loopback, for EfficientNet-Lite0 at 112 pixels and a folder of adapters with
random factors. Beside each third block of requests that name adapters is one of as many that name
none, which the same model answers without a bank. Meanwhile adapters are renewed in the folder.

Each answer is compared with `load_adapter` and a batch of one, made before: an answer is right if
it is that of the file that was in the folder when the request was sent, or until a second before
(for so long a listing of the folder is believed), or became so until the answer came.

Reported: requests a second (median of the blocks, and paired ratio), p50 and p99 of their time,
wrong answers, and the memory of all processes of the server (PSS without mapped files) after the
first, the middle and the last block. Goals: 0.85 of the throughput without adapters, constant
memory, no wrong answer.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bank import write_files
from machine import quartiles, save, setting
from PIL import Image
from safetensors.torch import save_file

from lora_lightning import load_adapter
from lora_lightning.vision.named_classifier import named_classifier

NAME, SIZE, TOP = "tf_efficientnet_lite0", 112, 5
BELIEVED = 1.1  # seconds that a listing of the folder is, and what it takes
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reply:
    """What a client saw."""

    name: str | None
    picture: int
    sent: float
    came: float
    status: int
    said: dict[str, Any]


def memory(root: int) -> float:
    """MB of a process and all below it, without mapped files; what they share counted once."""
    parents: dict[int, int] = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            told = Path(f"/proc/{entry}/stat").read_text().rpartition(") ")[2]
        except OSError:
            continue
        parents[int(entry)] = int(told.split()[1])
    family = {root}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    total = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total / 1000


class Folder:
    """The folder that is served: each adapter is one of two files, which take turns."""

    def __init__(self, path: Path, files: list[Path]):
        self.path, self._files = path, files
        self.names = [f"s{i:03d}" for i in range(len(files) // 2)]
        # Name → (time, which of the two files), an entry for each renewal.
        self.history: dict[str, list[tuple[float, int]]] = {}
        for name in self.names:
            self.renew(name)

    def renew(self, name: str) -> None:
        """Replace the file of a name by the other one."""
        past = self.history.setdefault(name, [])
        turn, beside = len(past) % 2, self.path / f".{name}"
        shutil.copyfile(self._files[self.names.index(name) + turn * len(self.names)], beside)
        past.append((time.monotonic(), turn))  # from now on it may be seen
        os.replace(beside, self.path / f"{name}.safetensors")

    def turns(self, name: str, since: float, until: float) -> set[int]:
        """Which of the two files it may have been between these times."""
        past = list(self.history[name])
        ends = [start for start, _ in past[1:]] + [float("inf")]
        spans = zip(past, ends, strict=True)
        return {turn for (start, turn), end in spans if start <= until and end >= since}


class Right:
    """Whether a reply is the answer of a file that it may have been.

    What is expected is computed picture by picture, each adapter loaded by `load_adapter`.
    """

    def __init__(self, base: Any, folder: Folder, files: list[Path], bodies: list[bytes]):
        pictures = [base.prepared.read(io.BytesIO(body))[None] for body in bodies]
        self._classes = {name: i for i, name in enumerate(base.classes)}
        self._folder, plain, found = folder, base.model, []
        for file in (None, *files):
            base.model = copy.deepcopy(plain)
            if file is not None:
                load_adapter(base.model, file)
            found.append([base.probabilities(picture)[0].numpy() for picture in pictures])
        first = np.stack([each[0] for each in found])
        apart = np.abs(first[:, None] - first[None]).max(axis=2) + np.eye(len(first))
        assert apart.min() > 20 * TOLERANCE, "two adapters give the same answer"
        self._source, *self._adapted = found

    def __call__(self, reply: Reply) -> bool:
        """Whether it is."""
        if reply.status != 200:
            return False
        said = {self._classes[c["class"]]: c["probability"] for c in reply.said["classes"]}
        return any(_agree(said, known[reply.picture]) for known in self._known(reply))

    def _known(self, reply: Reply) -> list[list[Any]]:
        if reply.name is None:
            return [self._source]
        number, many = self._folder.names.index(reply.name), len(self._folder.names)
        turns = self._folder.turns(reply.name, reply.sent - BELIEVED, reply.came)
        return [self._adapted[number + turn * many] for turn in turns]


def _agree(said: dict[int, float], known: Any) -> bool:
    """Whether these are the likeliest classes, with their probabilities."""
    return (
        len(said) == TOP
        and all(abs(known[k] - p) <= TOLERANCE for k, p in said.items())
        and min(said.values()) >= np.sort(known)[-TOP] - TOLERANCE
    )


def block(
    port: int, clients: int, works: list[tuple[str | None, int]], bodies: list[bytes]
) -> tuple[list[Reply], float]:
    """Answers to these requests, of so many clients at a time, and the seconds that they took."""
    replies: list[Reply] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while works:
            try:
                name, picture = works.pop()
            except IndexError:
                break
            query = f"top={TOP}" + ("" if name is None else f"&adapter={name}")
            sent = time.monotonic()
            connection.request("POST", f"/predict?{query}", bodies[picture])
            answer = connection.getresponse()
            said = json.loads(answer.read())
            replies.append(Reply(name, picture, sent, time.monotonic(), answer.status, said))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies, time.perf_counter() - start


def started(checkpoint: Path, folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The server, when it answers."""
    command = [sys.executable, "-W", "ignore", "-m", "lora_lightning.cli", "serve"]
    command += ["--model", NAME, "--checkpoint", str(checkpoint), "--size", str(SIZE)]
    command += ["--adapters", str(folder), "--port", str(port)]
    server = subprocess.Popen(command)
    while server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return server
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise SystemExit("the server did not start")


def photographs(number: int) -> list[bytes]:
    """JPEG files of smooth coloured noise."""
    generator, found = np.random.default_rng(0), []
    for _ in range(number):
        small = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def free_port() -> int:
    """A port of loopback."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


class Load:
    """Blocks of requests of both kinds in turns, while adapters are renewed.

    Args:
        given: The command's arguments.
        folder: That is served.
        bodies: The pictures.
    """

    def __init__(self, given: argparse.Namespace, folder: Folder, bodies: list[bytes]):
        self.given, self.folder, self.bodies = given, folder, bodies
        self.pairs: list[dict[str, float]] = []  # requests a second of either kind
        self.seconds: dict[str, list[float]] = {"source": [], "adapters": []}
        self.megabytes: list[float] = []
        self.wrong: list[Reply] = []
        self._draw = random.Random(0)

    def run(self, server: subprocess.Popen[bytes], port: int, right: Right) -> None:
        """All blocks."""
        every = [(name, 0) for name in (None, *self.folder.names) for _ in range(2)]
        block(port, self.given.clients, every, self.bodies)  # warms up
        until = time.monotonic() + 60 * self.given.minutes
        for number in range(self.given.blocks):
            if time.monotonic() > until:
                print(f"stopped after {self.given.minutes:g} minutes", file=sys.stderr)
                break
            kinds = ["adapters"] if number % 3 else ["adapters", "source"]
            found = []
            for kind in kinds if number % 2 else kinds[::-1]:
                with self._renewals(kind == "adapters"):
                    found.append((kind, self._block(kind, port, right)))
            if "source" in kinds:
                self.pairs.append(dict(found))
            self.megabytes.append(memory(server.pid))
            told = ", ".join(f"{kind} {rate:.1f}/s" for kind, rate in found)
            print(
                f"block {number + 1}: {told}, {self.megabytes[-1]:.0f} MB, {len(self.wrong)} wrong",
                flush=True,
            )

    def _block(self, kind: str, port: int, right: Right) -> float:
        """Requests a second of one block."""
        count = self.given.requests // self.given.blocks
        names = self.folder.names if kind == "adapters" else [None]
        pictures = range(len(self.bodies))
        works = [(self._draw.choice(names), self._draw.choice(pictures)) for _ in range(count)]
        replies, seconds = block(port, self.given.clients, works, self.bodies)
        assert len(replies) == count
        self.seconds[kind] += [r.came - r.sent for r in replies]
        self.wrong += [r for r in replies if not right(r)]
        return count / seconds

    @contextmanager
    def _renewals(self, wanted: bool) -> Iterator[None]:
        """Within the block adapters are renewed."""
        done, draw = threading.Event(), random.Random(len(self.megabytes))

        def renew() -> None:
            while not done.wait(self.given.renew):
                self.folder.renew(draw.choice(self.folder.names))

        thread = threading.Thread(target=renew)
        if wanted:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if wanted:
                thread.join()

    def figures(self) -> dict[str, Any]:
        """What it came to."""
        low, middle, high = quartiles([p["adapters"] / p["source"] for p in self.pairs])
        found: dict[str, Any] = {
            "adapters": len(self.folder.names),
            "clients": self.given.clients,
            "requests": len(self.seconds["adapters"]),
            "renewals": sum(map(len, self.folder.history.values())) - len(self.folder.names),
            "wrong": len(self.wrong),
            "ratio": f"{middle:.3f}",
            "ratio_low": f"{low:.3f}",
            "ratio_high": f"{high:.3f}",
        }
        for kind, seconds in self.seconds.items():
            p50, p99 = np.percentile(seconds, [50, 99])
            found[f"{kind}_per_s"] = f"{quartiles([p[kind] for p in self.pairs])[1]:.1f}"
            found |= {f"{kind}_p50_ms": f"{1000 * p50:.0f}", f"{kind}_p99_ms": f"{1000 * p99:.0f}"}
        places = {"first": 0, "middle": len(self.megabytes) // 2, "last": -1}
        return found | {f"mb_{at}": f"{self.megabytes[i]:.0f}" for at, i in places.items()}


def run(given: argparse.Namespace, work: Path) -> tuple[dict[str, Any], bool]:
    """Figures of one run, and whether all went well."""
    torch.set_num_threads(1)
    checkpoint = work / "base.safetensors"
    save_file(named_classifier(NAME).model.state_dict(), checkpoint)
    base = named_classifier(NAME, checkpoint, size=SIZE)
    for name in ("files", "served"):
        (work / name).mkdir()
    files, _ = write_files(base.model, work / "files", 2 * given.adapters)
    folder, bodies = Folder(work / "served", files), photographs(given.pictures)
    right = Right(base, folder, files, bodies)
    load, port = Load(given, folder, bodies), free_port()
    server = started(checkpoint, folder.path, port)
    try:
        load.run(server, port, right)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    for reply in load.wrong[:5]:
        print(reply, file=sys.stderr)
    return load.figures(), not load.wrong and code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default, text in (
        ("adapters", 64, "in the folder"), ("clients", 32, "at a time"),
        ("requests", 10_000, "that name adapters"), ("blocks", 40, "in which they come"),
        ("pictures", 4, "that are sent"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--renew", type=float, default=1.0, help="seconds between renewals")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which it stops")
    parser.add_argument("--smoke", action="store_true", help="half a minute's worth")
    parser.add_argument("--no-save", action="store_true", help="print only")
    given = parser.parse_args()
    if given.smoke:
        small = {"adapters": 4, "clients": 4, "requests": 120, "blocks": 2, "pictures": 2}
        vars(given).update(small)
    where = setting("litserve")
    with tempfile.TemporaryDirectory() as work:
        found, well = run(given, Path(work))
    for name, value in found.items():
        print(f"{name:16} {value}")
    if not given.no_save:
        print(save("serve", [found], where))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
