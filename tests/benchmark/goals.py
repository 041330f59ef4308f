"""Ratios of one run, by CPU seconds of one thread, so that other work on the machine counts little -> docs/speed.md.

python -m tests.benchmark.goals [clip] [start] [step] [mel] [train] [--before CHECKOUT]; each replaces its rows.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from refined_ldm.conditioning import guided_noise
from refined_ldm.inference import optimize_for_inference
from refined_ldm.mel import MelSpectrogram
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.unet import DeepFeatures
from tests.benchmark.baselines import diffusers_unet, librosa_log_mel

TABLE = Path(__file__).parents[2] / "figures" / "data" / "bench_goals.csv"
STEPS, INTERVAL = 25, 3  # of sampling; cache_interval


def clip(before=None):
    """Sounds of `tiny` in a warm process: as configured, and one sound of the student, beside 15 guided steps.

    Both also in the precision that `optimize_for_inference` picks.
    """
    model = RefinedAudioLDM.from_preset("tiny")
    teacher = {"sampler": "dpmpp", "steps": 15, "candidates": 1}
    counts = ((1, "one caption", 0.34, 0.08), (8, "eight captions", 0.19, 0.05))

    def best(count, how):
        captions = ["a dog barks twice"] * count
        return min(seconds(lambda: model.generate(captions, **how)) for _ in range(4)) / count

    refiner, model.refiner = model.refiner, None
    theirs, found = {count: best(count, teacher) for count, *_ in counts}, {}  # as it was before there was a refiner
    model.refiner = refiner
    for arithmetic in ("", ", optimised"):
        if arithmetic:
            optimize_for_inference(model)
        for count, name, *_ in counts:
            for way, how in (("the best of eight", {}), ("one sound of the student", {"candidates": 1})):
                found[f"{name} of tiny in a warm process, each: {way}{arithmetic}"] = count, best(count, how)
    goals = {count: round(today / goal, 2) for count, _, today, goal in counts}
    return [row("clip", work, took, "15 guided steps", theirs[count], goals[count])
            for work, (count, took) in found.items()]  # fmt: skip


def start(before=None):
    """Whole processes: `generate`, the same of an earlier checkout, `import torch` and --help."""
    with tempfile.TemporaryDirectory() as folder:
        generate = ["-m", "refined_ldm", "generate", "a dog barks", "--out", folder]
        work = "refined-ldm generate, one clip of tiny, a whole process"
        seconds = process(generate)
        others = {"import torch, which it needs": (process(["-c", "import torch"]), None)}
        if before:
            others["the same before"] = process(generate, before), 2.24
        return [row("start", work, seconds, other, *found) for other, found in others.items()]


def step(before=None):
    """A guided step of the published U-Net: complete, and the mean of 25 with DeepCache."""
    from tests.benchmark.against_peers import _awake, _published_model, _unet_inputs

    z_t, t, c = _unet_inputs()
    unet, theirs = _published_model().unet, _awake(diffusers_unet())
    deep = DeepFeatures(INTERVAL)
    ours = partial(guided_noise, partial(unet, deep=deep), z_t[:1], t[:1], c[:1], c[1], 3.0)
    with torch.no_grad():
        found = [(seconds(ours), deep.calls) for _ in range(3 * INTERVAL)]
        peer = min(seconds(lambda: theirs(z_t, t, None, class_labels=c)) for _ in range(2))
    complete, reused = (min(s for s, calls in found if (calls == 1) == whole) for whole in (True, False))
    first = -(-STEPS // INTERVAL)
    mean = (first * complete + (STEPS - first) * reused) / STEPS
    work = "U-Net S, one guided step of 10.24 s"
    cached = f"{work}, mean of {STEPS} with cache_interval={INTERVAL}"
    return [row("step", work, complete, "diffusers fp32", peer, None),
            row("step", cached, mean, "diffusers fp32", peer, 3)]  # fmt: skip


def mel(before=None):
    """The log-mel of clips of 10 s."""
    front, waveform = MelSpectrogram(), 0.1 * torch.randn(10, 160_000, generator=torch.Generator().manual_seed(0))
    librosa_log_mel(waveform[:1].numpy())
    with torch.no_grad():
        ours = min(seconds(lambda: front(waveform)) for _ in range(3))
    peer = min(seconds(lambda: librosa_log_mel(waveform.numpy())) for _ in range(3))
    rows = [row("mel", "log-mel of 10 clips of 10 s, one thread", ours, "librosa", peer, None)]
    with torch.no_grad(), all_cores():  # by the clock: other work on the machine counts
        ours = min(seconds(lambda: front(waveform), time.perf_counter) for _ in range(5))
    peer = min(seconds(lambda: librosa_log_mel(waveform.numpy()), time.perf_counter) for _ in range(3))
    work = f"log-mel of 10 clips of 10 s, {os.cpu_count()} cores, of which librosa uses one"
    return [*rows, row("mel", work, ours, "librosa", peer, 3.5)]


TRAINING = """
import time, torch
from refined_ldm.training.muon import Muon, split_parameters
from refined_ldm.unet import UNet, UNetConfig
torch.set_num_threads(1)
torch.manual_seed(0)
unet = UNet(UNetConfig(model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(2, 4),
                       attention_layers=1, embedding_dim=256, patch_size=2, film_scale=True, norm_groups=16))
for parameter in unet.parameters():
    torch.nn.init.normal_(parameter, std=0.02)  # a new one is zero in parts
latent, t, c = torch.randn(16, 8, 64, 16), torch.randint(1000, (16,)), torch.randn(16, 256)
half = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
muon = Muon(split_parameters(unet)[0], dtype=torch.bfloat16 if half else torch.float32)
def gradients():
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = unet(latent, t, c).float().square().mean()
    loss.backward()
def seconds(work):
    begun = time.thread_time()
    work()
    return time.thread_time() - begun
print(*(min(seconds(work) for _ in range(5)) for work in (gradients, muon.step)))
"""


def train(before=None):
    """A training step of a U-Net of `tiny`'s size on a batch of 16: of an earlier checkout, and Muon's part of it."""
    gradients, update = map(float, process_output(["-c", TRAINING]).split())
    work = "training step of a U-Net of tiny's size, batch 16"
    rows = [row("train", f"{work}: Muon's update in it", update, "forward and backward", gradients, None)]
    if before:
        theirs = sum(map(float, process_output(["-c", TRAINING], before).split()))
        rows.insert(0, row("train", work, gradients + update, "the same before", theirs, 1.9))
    return rows


def row(name, work, ours, other, theirs, goal):
    command = f"python -m tests.benchmark.goals {name}"
    return {"name": name, "work": work, "seconds": round(ours, 4), "other": other, "other_seconds": round(theirs, 4),
            "ratio": round(theirs / ours, 2), "goal": goal, "command": command}  # fmt: skip


def seconds(work, clock=time.thread_time):
    """Seconds by a clock: the processor's of this thread."""
    begun = clock()
    work()
    return clock() - begun


@contextmanager
def all_cores():
    """Let torch use every core."""
    torch.set_num_threads(os.cpu_count())
    try:
        yield
    finally:
        torch.set_num_threads(1)


def process(arguments, path=None):
    """CPU seconds of a Python process in a checkout, by default this one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process_output(arguments, path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def process_output(arguments, path=None):
    """What a Python process with one thread prints, in a checkout, by default this one."""
    path = str(Path(path or Path(__file__).parents[2]).resolve())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, *arguments], check=True, cwd=path, env=environment, stdout=subprocess.PIPE)
    return ran.stdout.decode()


def main(arguments=None, table=TABLE) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.goals", description=__doc__)
    parser.add_argument("names", nargs="*", help="what to measure; nothing: all")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an earlier checkout, whose start is measured")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for name in options.names or PARTS:
        found = pd.DataFrame(PARTS[name](options.before))
        if table.is_file():
            stored = pd.read_csv(table)
            found = pd.concat([stored[stored["name"] != name], found])
        found.to_csv(table, index=False)
        print(found[found["name"] == name].to_string(index=False))


PARTS = {"clip": clip, "start": start, "step": step, "mel": mel, "train": train}


if __name__ == "__main__":
    main()
