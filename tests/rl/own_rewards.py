"""Rewards of a user's, sound and broken; the workers import this file."""

import math
import os
import sys

import numpy as np


def half(text, sample):
    return np.float32(0.5)


def yes(text, sample):
    return bool(text)


def no_verdict(text, sample):
    return math.nan


def too_much(text, sample):
    return 2


def words(text, sample):
    return "good"


def bug(text, sample):
    return {}["score"]


def endless(text, sample):
    while text:
        pass
    return 1.0


def one_argument(text):
    return 1.0


def killed(text, sample):
    os._exit(5)


def leaves(text, sample):
    sys.exit("enough")


def no_number(text, sample):
    return np.array("good")


def only_on_answers(text, sample):
    """Sound on what is tried at start, broken on what a model writes."""
    if text and not text.startswith("<think>It is so."):
        raise RuntimeError("never saw such a text")
    return 1.0
