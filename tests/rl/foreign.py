"""What tests run in the workers of rewards/bounded.py, which import this module: it imports nothing heavy."""

import os
import time


def sleepy(seconds):
    time.sleep(seconds)  # as a process that isn't given a processor
    return "awake"


def endless():
    while True:
        pass


def unpacked():
    import no_such_package  # noqa: F401


def dismissed():
    os._exit(3)


def broken():
    raise ValueError("no answer")
