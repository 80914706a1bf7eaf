"""A function of tasks for tests/runner/test_tasks.py; importing it takes no time."""

import os
import signal
import time


def answer(folder, item):
    if item == "dies" or (item == "dies once" and not (folder / "died").exists()):
        if item == "dies once":
            (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "dies once":
        return "the second time"
    if item == "raises":
        raise ValueError("a reason")
    if item == "a lambda":
        return lambda: None
    if item == "waits":
        (folder / f"pid-{os.getpid()}").touch()
        time.sleep(60)
    print("said", item)
    return item * item
