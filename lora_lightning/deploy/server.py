"""The server of a `Service`, on LitServe: it receives requests, and gives them over in batches.

LitServe starts three kinds of processes: one receives, checks and decodes (forked), each worker has
a model and answers (spawned), and a manager holds the queues between them. What is wrong with a
request is said before it is queued, so that a batch holds only what can be answered: LitServe
refuses a whole batch for one of its requests.
"""

# No `from __future__ import annotations`: FastAPI reads the annotation of `decode_request`.
import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty
from typing import Annotated, Any

from fastapi import Depends
from litserve import LitAPI, LitServer
from litserve.loops.simple_loops import BatchedLoop
from starlette.responses import JSONResponse, Response

from lora_lightning.deploy.adapter_folder import AdapterFolder
from lora_lightning.deploy.answers import Answers
from lora_lightning.deploy.intake import Intake, Job
from lora_lightning.deploy.reception import BATCH, PATH, Desk, Gate, Metrics, received
from lora_lightning.deploy.service import Answer, Service

AT_ONCE = 256  # connections; more are answered 503
TRIM = 5.0  # seconds between returns of freed memory
Pulled = tuple[list[tuple[int, str, Job]], list[tuple[int, str]]]


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        body: Bytes of a body.
        batch: Requests in a batch.
        wait: Seconds that a batch waits for more of them.
        capacity: Adapters in memory.
        seconds: A request that waits longer for its batch is answered 504.
    """

    body: int = 16_000_000
    batch: int = 16
    wait: float = 0.005
    capacity: int = 256
    seconds: float = 30.0


class Batches(BatchedLoop):  # type: ignore[misc]
    """Takes requests as they come.

    LitServe's own loop asks for them a thousand times a second, or all the time.
    """

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> Pulled:
        """The requests of a batch; and those that waited too long."""
        found: list[tuple[int, str, Job]] = []
        late: list[tuple[int, str]] = []
        until = 0.0
        while len(found) < lit_api.max_batch_size:
            wait = max(until - time.monotonic(), 0.0) if until else 1.0
            try:
                consumer, uid, sent, job = request_queue.get(timeout=wait)
            except Empty:
                break
            until = until or time.monotonic() + lit_api.batch_timeout
            if time.monotonic() - sent > lit_api.request_timeout:
                late.append((consumer, uid))
            else:
                found.append((consumer, uid, job))
        return found, late


class AdapterAPI(LitAPI):  # type: ignore[misc]
    """A `Service` in a worker.

    Args:
        load: Gives the base.
        folder: Of the adapters.
        limits: Of batches and memory.
    """

    def __init__(self, load: Callable[[], Answers], folder: AdapterFolder, limits: Limits):
        super().__init__(limits.batch, limits.wait, PATH, loop=Batches())
        self._load, self._folder, self._capacity = load, folder, limits.capacity

    def setup(self, device: str) -> None:
        """Load the base."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C; the server ends its workers
        answers = self._load()
        answers.model.to(device)
        self._service = Service(answers, self._folder, self._capacity)
        self._trimmed = time.monotonic()
        gc.collect()
        gc.freeze()  # so that later collections are quick: they look at no module of torch

    def decode_request(self, request: Annotated[Job, Depends(received)]) -> Job:
        """It is decoded where it is received."""
        return request

    def batch(self, inputs: list[Job]) -> list[Job]:
        """Its own, as recordings are of different lengths."""
        return inputs

    def predict(self, x: list[Job]) -> list[tuple[Answer, int]]:
        """The answers, and how many there are."""
        answers = [(answer, len(x)) for answer in self._service.answer(x)]
        if time.monotonic() - self._trimmed > TRIM:
            _trim()
            self._trimmed = time.monotonic()
        return answers

    def encode_response(self, output: tuple[Answer, int]) -> Response:
        """An answer with its status."""
        (status, body), batch = output
        return JSONResponse(body, status, {BATCH.decode(): str(batch)})


def _trim() -> None:
    """Free what is held by cycles alone, and give freed memory back to the system.

    Python's collector counts objects, not the bytes of their tensors; glibc's allocator keeps what
    lies below something in use.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _stop_quietly() -> None:
    """SIGTERM ends LitServe as Ctrl-C does; the processes that it forks end without a traceback."""
    owner = os.getpid()

    def stop(*_: Any) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def serve(
    load: Callable[[], Answers],
    intake: Intake,
    folder: AdapterFolder,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    accelerator: str = "auto",
    key: str | None = None,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Args:
        load: Gives the base, in each worker; can be pickled.
        intake: Of that base.
        folder: Of the adapters.
        limits: What is accepted.
        host: Address to listen at: 127.0.0.1, or 0.0.0.0 and :: for all.
        port: 1024 to 65535.
        accelerator: cpu, cuda, mps or auto.
        key: That requests must have.
    """
    metrics = Metrics(folder)
    server = LitServer(
        AdapterAPI(load, folder, limits),
        accelerator=accelerator,
        timeout=limits.seconds,
        middlewares=[(Gate, {"metrics": metrics, "key": key})],
        disable_openapi_url=True,
    )
    server.app.state.desk = Desk(intake, folder, limits.body)
    server.app.get("/metrics")(metrics.page)
    _stop_quietly()
    try:
        server.run(
            host, port, num_api_servers=1, log_level="warning", generate_client_file=False,
            access_log=False, server_header=False, limit_concurrency=AT_ONCE,
        )  # fmt: skip
    except (EOFError, ConnectionError):  # LitServe has ended its manager
        raise SystemExit(
            "the server ended, as a worker did (the memory is full?); start it again"
        ) from None
