"""Generate, train and resume in a loop in one process, with faults at random, and watch its memory.

Command: `python -m tests.support.faults --soak 60`.
"""

import ctypes
import gc
import io
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import psutil
import torch

from refined_ldm.cli import commands as cli
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import faults

CAPTIONS = ["bell 0", "bell 1", "a dog", "rain", "bell 4", "wind and a bell", "a bell, far away", "nothing"]


def soak(campaign, minutes):
    """-> what was lost, printing how often was tried what, and the slope of memory over time."""
    me, dice, tried, samples = psutil.Process(), random.Random(campaign.dice.random()), Counter(), []
    expected, end = None, time.monotonic() + 60 * minutes
    lost = campaign.lost
    while time.monotonic() < end:
        stage = dice.choice(campaign.stages)
        run = campaign.prepare(stage)
        how = dice.choice(["nothing", "disk full", "Ctrl-C", "SIGTERM", "kill -9"])
        tried[how] += 1
        if how == "kill -9":
            shutil.rmtree(run)
            campaign.kill()
        else:
            disturbed(campaign, stage, run, how, dice)
            status, printed = train(campaign.command(stage, run, "--resume"))
            if status or (printed := campaign.faults(stage, run)):
                lost.append(f"{how} in {stage}: {printed}")
            shutil.rmtree(run)
        tried["generate"] += 1
        model, order = RefinedAudioLDM.load(campaign.root / "unbroken"), dice.sample(range(8), dice.randint(1, 8))
        sounds = model.generate([CAPTIONS[i] for i in order])
        if expected is None:
            expected = model.generate(CAPTIONS)
        if (difference := (sounds - expected[order]).abs().max()) > 1e-4:
            lost.append(f"generated sounds differ by {difference:.2g} in another company")
        del model, sounds
        give_back()
        samples.append((time.monotonic(), me.memory_info().rss / 2**20, me.num_fds(), me.num_threads()))
    report(samples, tried)
    return lost


def give_back():
    """Have Python and the C library give back what is not in use: what then grows is a leak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def disturbed(campaign, stage, run, how, dice):
    """Train a stage in this process while something goes wrong."""
    if how == "disk full":
        DISK.left, DISK.folder = dice.randint(1, 120), str(run)
    elif how != "nothing":
        number = signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM
        timer = threading.Timer(dice.uniform(0.05, campaign.seconds[stage]), os.kill, (os.getpid(), number))
        timer.start()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # one that comes after the end is no end
    try:
        train(campaign.command(stage, run))
        if how in ("Ctrl-C", "SIGTERM"):
            timer.join()
    except KeyboardInterrupt:
        pass
    finally:
        DISK.left = 0
        signal.signal(signal.SIGTERM, before)


def train(arguments):
    """Run a command in this process -> (its status, what it printed)."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        status = cli.main([str(a) for a in arguments])
    return status, printed.getvalue()


DISK = faults.FileEvents("", 0, faults.disk_full)


def report(samples, tried):
    print(", ".join(f"{what} {count}" for what, count in tried.items()))
    freeze_encoder = np.array(samples[len(samples) // 3 :])  # until then caches fill
    hours = (freeze_encoder[:, 0] - samples[0][0]) / 3600
    for column, name in enumerate(("memory in MB", "open files", "threads"), 1):
        values = freeze_encoder[:, column]
        if len(values) > 2:
            slope, error = fit(hours, values)
            print(f"{name}: {values[0]:.0f} to {values[-1]:.0f}, slope {slope:+.1f} +- {error:.1f} an hour")


def fit(x, y):
    """Slope of a straight line by least squares, and its standard error."""
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return slope, covariance[0, 0] ** 0.5


def main(campaign, minutes):
    torch.set_num_threads(1)
    DISK()
    return soak(campaign, minutes)
