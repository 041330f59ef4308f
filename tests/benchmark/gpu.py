"""What a GPU does with this project, measured in minutes: `make gpu`.

For a machine with one GPU. Sections run in the order below, the most valuable first, each within its own limit of
seconds; after each row the results so far are in gpu.json, so that nothing is lost when the time is over. docs/gpu.md
is written from that file once it is copied to docs/gpu.json. `--small` turns all sizes down for a CPU. The last section
trains in what time is left; `--only training` gives it all of it.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from refined_ldm.base.files import atomic_write
from refined_ldm.clap import Clap, ClapConfig
from refined_ldm.config import Config, StageConfig, load_config, preset
from refined_ldm.data.batches import loader
from refined_ldm.devices import HALF, allow_tf32, exact_float32, pick_accelerator, pick_device, synchronize
from refined_ldm.discriminators import Discriminators
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.pipeline import train_stage
from refined_ldm.training.stages import TRAINERS
from refined_ldm.vae import PatchDiscriminator, PatchDiscriminatorConfig
from tests.support import small
from tests.support.accelerators import forget_accelerators

PEAK = 989e12  # a second: bfloat16 of an H100 SXM without sparsity, as its maker states
CAPTION, SECONDS = "a dog barks twice", 480
SAVED = 120  # seconds between two times that the training writes its weights
ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("03", "04", "05", "07", "08", "09", "02", "01", "06")  # those that train or generate first


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are for a GPU, `SMALL` for a CPU."""

    product: int = 8192  # rows of the matrices that are multiplied
    copied: int = 2**28  # bytes
    batches: tuple[int, ...] = (2, 16, 64)
    runs: int = 8  # of what is timed
    resumed: int = 10  # training steps, broken off after half of them
    steps: int = 25  # of the sampler
    notebooks: tuple[str, ...] = NOTEBOOKS
    config: Config | None = None  # None: the published sizes, with the conditioner of `tiny`
    clap: ClapConfig | None = None  # None: the shipped one
    compiled: bool = True
    trained: int | None = None  # steps and clips of the training at the end; None: those of launch/tiny_details.yaml

    def published(self, device: torch.device) -> RefinedAudioLDM:
        """The model of published size, with random weights."""
        paper = preset("paper")
        config = self.config or paper.changed(clap="tiny-gpt2", unet=replace(paper.unet, embedding_dim=256))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = RefinedAudioLDM(config, clap=self.clap and Clap(self.clap))
        small.awake(model.unet)
        return model.to(device).eval()

    def shipped(self, device: torch.device) -> RefinedAudioLDM:
        """The shipped model, or a small one."""
        return self.published(device) if self.config else RefinedAudioLDM.from_preset("tiny", device)

    def details(self, folder: Path) -> Config:
        """The settings of the training at the end; a small one starts from weights that are written to `folder`."""
        if self.config is None:
            return load_config(ROOT / "launch" / "tiny_details.yaml")
        self.published(torch.device("cpu")).save(folder)
        stage = replace(self.config.training["ldm"], max_steps=self.trained, save_every=1000)
        training = self.config.training | {"ldm": stage}
        return self.config.changed(training=training, clips=self.trained, seconds=1.28, start_from=str(folder))


SMALL_CONFIG = small.config(vae_discriminator=PatchDiscriminatorConfig(8, 2))
SMALL = Sizes(32, 2**12, (1, 2), 1, 2, 2, (), SMALL_CONFIG, small.CLAP, compiled=False, trained=8)


@dataclass
class Machine:
    """Where to measure, and how much."""

    device: torch.device
    sizes: Sizes
    ends: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    out: Path = Path("runs/gpu")
    section_ends: float = math.inf

    @property
    def left(self) -> float:
        """Seconds until the section must end."""
        return min(self.ends, self.section_ends) - time.monotonic()

    def seconds(self, call: Callable[[], object]) -> float:
        """Mean seconds of a call, after two that warm up."""
        for _ in range(2):
            call()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.sizes.runs):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.sizes.runs

    def begin(self) -> None:
        """Count the memory's peak anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def gigabytes(self) -> float | None:
        """The peak of the memory since `begin`; None on other devices."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.device.type == "cuda" else None

    def autocast(self, precision: str) -> torch.autocast | nullcontext:
        return torch.autocast(self.device.type, HALF[precision]) if precision in HALF else nullcontext()


SECTIONS: dict[str, tuple[Callable[[Machine], Iterator[dict]], int]] = {}  # each yields its rows


def section(limit: int) -> Callable:
    """Register a section with its limit in seconds."""

    def register(function: Callable[[Machine], Iterator[dict]]) -> Callable[[Machine], Iterator[dict]]:
        SECTIONS[function.__name__] = function, limit
        return function

    return register


@section(30)
def facts(m: Machine) -> Iterator[dict]:
    """What the machine can do: products of matrices, copies, launches."""
    n = m.sizes.product
    for name, dtype, exact in (("bfloat16", torch.bfloat16, False), ("float16", torch.float16, False),
                               ("TF32", torch.float32, False), ("float32", torch.float32, True)):  # fmt: skip
        allow_tf32(m.device.type)
        a = torch.randn(n, n, device=m.device).to(dtype)  # equal numbers take less power, so the clock would be higher
        with exact_float32() if exact else nullcontext():
            seconds = m.seconds(lambda a=a: a @ a)
        yield {"what": f"product of two {n:,} x {n:,} matrices in {name}", "unit": "TFLOP/s",
               "value": _three(2 * n**3 / seconds / 1e12)}  # fmt: skip
    there = torch.ones(m.sizes.copied // 4, device=m.device)
    plain = torch.ones(m.sizes.copied // 4)
    copies = {"within the device (read and written)": (lambda: there.clone(), 2), "from the CPU": (
        lambda: plain.to(m.device), 1)}  # fmt: skip
    if m.device.type == "cuda":
        pinned = plain.pin_memory()
        copies["from pinned memory"] = lambda: pinned.to(m.device, non_blocking=True), 1
    for name, (copy, k) in copies.items():
        yield {"what": f"copy {name}", "unit": "GB/s", "value": _three(k * m.sizes.copied / m.seconds(copy) / 1e9)}
    one = torch.ones(1, device=m.device)
    launch = m.seconds(lambda: [one.add_(1) for _ in range(1000)]) / 1000
    yield {"what": "one operation on one number", "unit": "µs", "value": _three(launch * 1e6)}


def _three(x: float) -> float:
    """Three digits that count."""
    return float(f"{x:.3g}")


@section(60)
@torch.no_grad()
def against_cpu(m: Machine) -> Iterator[dict]:
    """The same numbers as on the CPU, within rounding; one seed twice."""
    cpu, model = m.sizes.shipped("cpu"), m.sizes.shipped(m.device)
    generator, unet = torch.Generator().manual_seed(0), cpu.config.unet
    inputs = (torch.randn(2, *cpu.latent_shape(cpu.config.seconds), generator=generator), torch.tensor([100, 900]),
              torch.randn(2, unet.condition_dim, generator=generator))  # fmt: skip
    expected = cpu.unet(*inputs)

    def row(what: str, error: float, goal: float) -> dict:
        return {"what": what, "error": _three(error), "goal": goal, "met": bool(error <= goal)}

    for name, precision, goal in (("float32", "no", 1e-5), ("TF32", "no", 2e-3), ("bfloat16", "bf16", 2e-2),
                                  ("float16", "fp16", 5e-3)):  # fmt: skip
        allow_tf32(m.device.type)
        with exact_float32() if name == "float32" else nullcontext(), m.autocast(precision):
            found = model.unet(*(x.to(m.device) for x in inputs)).float().cpu()
        yield row(f"U-Net in {name}: relative error", ((found - expected).norm() / expected.norm()).item(), goal)
    make = lambda of: of.generate([CAPTION], steps=m.sizes.steps).cpu()  # noqa: E731
    sound = make(model)
    yield row("one seed twice: largest difference", (sound - make(model)).abs().max().item(), 0.0)
    yield row("generated from a caption: log-mel L1", (cpu.mel(sound) - cpu.mel(make(cpu))).abs().mean().item(), 0.02)


def _clips(m: Machine, config: Config, stage: str, count: int) -> list[dict]:
    """Random clips, or latents with embeddings for the U-Net."""
    generator, samples = torch.Generator().manual_seed(0), config.samples
    vae, mel = config.vae, config.mel
    latent = (vae.latent_channels, samples // mel.hop_length // vae.downsampling, mel.n_mels // vae.downsampling)
    if stage == "ldm":
        width = config.unet.condition_dim
        return [{"id": str(i), "latent": torch.randn(latent, generator=generator),
                 "embeddings": torch.randn(3, width, generator=generator)} for i in range(count)]  # fmt: skip
    return [{"id": str(i), "waveform": 0.2 * torch.rand(samples, generator=generator) - 0.1,
             "captions": (CAPTION, f"{i} times rain")} for i in range(count)]  # fmt: skip


def _trained(m: Machine, model: RefinedAudioLDM, stage: str, settings: StageConfig, precision: str | None = None,
             **run) -> Iterator:  # fmt: skip
    """The generator that trains a stage of a model on random clips, with its discriminators."""
    model.config = model.config.changed(training=model.config.training | {stage: settings})
    extra = {}
    torch.manual_seed(0)
    if stage == "vae" and settings.adversarial_weight:
        extra["discriminator"] = PatchDiscriminator(model.config.vae_discriminator).to(m.device)
    if stage == "hifigan":
        extra["discriminators"] = Discriminators(model.config.discriminators).to(m.device)
    forget_accelerators()
    accelerator = pick_accelerator(m.device, precision)
    data = _clips(m, model.config, stage, 2 * settings.batch_size)
    return TRAINERS[stage](model, loader(data, settings.batch_size), accelerator=accelerator, **extra, **run)


@section(90)
def resumed(m: Machine) -> Iterator[dict]:
    """Ten steps of each stage, broken off after five and resumed, beside ten unbroken ones."""
    half = m.sizes.resumed // 2
    for stage in TRAINERS:
        settings = StageConfig(2 * half, 4, 1e-4, warmup_steps=2, save_every=half, ema_decay=0.9, crop_frames=32,
                               optimizer="muon" if stage == "ldm" else "adamw", adversarial_weight=0.1)  # fmt: skip
        losses = [step.loss for step in _trained(m, m.sizes.shipped(m.device), stage, settings)]
        with tempfile.TemporaryDirectory() as folder:
            with closing(_trained(m, m.sizes.shipped(m.device), stage, settings, run_dir=folder)) as steps:
                first = [step.loss for step in islice(steps, half)]
            again = _trained(m, m.sizes.shipped(m.device), stage, settings, run_dir=folder, resume=True)
            second = [step.loss for step in again]
        precision = pick_accelerator(m.device).mixed_precision
        error = max(abs(a - b) / abs(b) for a, b in zip(first + second, losses, strict=True))
        goal = 1e-3 if precision == "no" else 5e-3
        yield {"stage": stage, "precision": precision, "largest relative difference of a loss": _three(error),
               "goal": goal, "met": bool(error <= goal)}  # fmt: skip


@contextmanager
def _memory(m: Machine, row: dict) -> Iterator[None]:
    """Add the peak of the memory to a row; a size that does not fit is a result, too."""
    m.begin()
    try:
        yield
        row["memory, GB"] = m.gigabytes()
    except torch.OutOfMemoryError:
        row["memory, GB"] = "more than there is"


@section(90)
def unet(m: Machine) -> Iterator[dict]:
    """The U-Net at published size: where the time of a step goes, share of the peak, memory."""
    model, rows = m.sizes.published(m.device), []
    for batch in m.sizes.batches:
        row = {"batch": batch}
        with _memory(m, row):
            row |= _split(m, model, batch)
        rows.append(row)
        yield row
    if find_spec("matplotlib"):
        draw(rows, m.out / "gpu_unet.png")


def _split(m: Machine, model: RefinedAudioLDM, batch: int) -> dict:
    """{part of a training step: milliseconds}. The whole is timed as it runs, the parts one by one."""
    steps = 2 + m.sizes.runs
    settings = StageConfig(steps, batch, 1e-5, ema_decay=0.999)

    def step_seconds(settings: StageConfig) -> tuple[float, float]:
        run = list(islice(_trained(m, model, "ldm", settings), steps))[2:]
        return sum(s.seconds for s in run) / len(run), sum(s.waited for s in run) / len(run)

    whole, data = step_seconds(settings)
    without, _ = step_seconds(replace(settings, ema_decay=0.0))
    precision, z = pick_accelerator(m.device).mixed_precision, model.latent_shape(model.config.seconds)
    inputs = (torch.randn(batch, *z, device=m.device), torch.full((batch,), 500, device=m.device),
              torch.randn(batch, model.config.unet.condition_dim, device=m.device))  # fmt: skip

    def forward() -> torch.Tensor:
        with m.autocast(precision):
            return model.unet(*inputs).float().square().mean()

    model.unet.train()
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    there, both = m.seconds(forward), m.seconds(lambda: forward().backward())
    model.unet.zero_grad(set_to_none=True)
    average, rest = max(0.0, whole - without), max(0.0, whole - data - both - max(0.0, whole - without))
    parts = {"data": data, "forward": there, "backward": max(0.0, both - there), "average": average,
             "optimiser, noise and waiting": rest, "whole step": whole}  # fmt: skip
    return {"precision": precision, **{f"{name}, ms": round(1e3 * x, 2) for name, x in parts.items()},
            "share of an H100's peak": round(counter.get_total_flops() / whole / PEAK, 4)}  # fmt: skip


@section(60)
def vae_and_vocoder(m: Machine) -> Iterator[dict]:
    """Training steps of VAE and vocoder at published size, with their discriminators."""
    model = m.sizes.published(m.device)
    for stage in ("vae", "hifigan"):
        for batch in m.sizes.batches[:2]:
            row, settings = {"stage": stage, "batch": batch}, model.config.training[stage]
            settings = replace(settings, max_steps=2 + m.sizes.runs, batch_size=batch, warmup_steps=2, disc_start=0,
                               adversarial_weight=0.1)  # fmt: skip
            with _memory(m, row):
                run = list(_trained(m, model, stage, settings))[2:]
                row["whole step, ms"] = round(1e3 * sum(s.seconds for s in run) / len(run), 2)
            yield row


@section(60)
@torch.no_grad()
def sampling(m: Machine) -> Iterator[dict]:
    """From a caption to its sound at published size, and the U-Net's steps alone: eager, and as a CUDA graph."""
    model = m.sizes.published(m.device)
    precision = optimize_for_inference(model).precision
    for captions in (1, 8):
        row = {"what": f"{captions} captions to sounds of {model.config.seconds:g} s, {m.sizes.steps} steps"}
        with _memory(m, row):
            seconds = m.seconds(lambda n=captions: model.generate([CAPTION] * n, steps=m.sizes.steps).cpu())
            row |= {"precision": precision, "seconds": round(seconds, 4)}
        yield row
    shape, width = model.latent_shape(model.config.seconds), model.config.unet.condition_dim
    inputs = (torch.randn(2, *shape, device=m.device), torch.full((2,), 500, device=m.device),
              torch.randn(2, width, device=m.device))  # fmt: skip
    for name in ("eager", "as a CUDA graph")[: 2 if m.device.type == "cuda" else 1]:
        call = model.unet if name == "eager" else graphed(model.unet, *inputs)
        row = {"what": f"{m.sizes.steps} guided steps of the U-Net, {name}", "precision": precision}
        with _memory(m, row):
            row["seconds"] = round(m.sizes.steps * m.seconds(lambda call=call: call(*inputs)), 4)
        yield row


def graphed(module: torch.nn.Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A module recorded as a CUDA graph for inputs of these shapes: one launch in place of thousands."""
    kept = [x.clone() for x in inputs]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what libraries choose at the first calls is not recorded
        for _ in range(3):
            module(*kept)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(*kept)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        for place, x in zip(kept, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return out.clone()

    return call


@section(60)
def half_precision(m: Machine) -> Iterator[dict]:
    """float16, which a T4 trains in, beside bfloat16 and float32: losses and seconds of the same ten steps."""
    for precision in ("no", "bf16", "fp16") if m.device.type == "cuda" else ("no",):  # fp16 is for GPUs
        settings = StageConfig(10, 4, 1e-4, warmup_steps=2, ema_decay=0.9)
        steps = list(_trained(m, m.sizes.shipped(m.device), "ldm", settings, precision))
        mean = sum(step.seconds for step in steps[2:]) / len(steps[2:])
        last = steps[-1]
        yield {"precision": precision, "loss of the last step": round(last.loss, 5),
               "whole step, ms": round(1e3 * mean, 2), "overflows": int(last.losses.get("overflows", 0))}  # fmt: skip


@section(60)
@torch.no_grad()
def what_helps(m: Machine) -> Iterator[dict]:
    """The U-Net of a guided step, with one thing changed at a time."""
    ways = {"as built": lambda model: None, "channels last": lambda model: model.unet.to(
        memory_format=torch.channels_last)}  # fmt: skip
    ways |= {f"optimize_for_inference, {p}": lambda model, p=p: optimize_for_inference(model, p) for p in ("no", *HALF)}
    if m.sizes.compiled:
        ways["optimize_for_inference, compiled"] = lambda model: optimize_for_inference(model, compile=True)
    for name, change in ways.items():
        model = m.sizes.published(m.device)
        change(model)
        shape = model.latent_shape(model.config.seconds)
        inputs = (torch.randn(2, *shape, device=m.device), torch.full((2,), 500, device=m.device),
                  torch.randn(2, model.config.unet.condition_dim, device=m.device))  # fmt: skip
        row = {"what": name}
        with _memory(m, row):
            row["ms"] = round(1e3 * m.seconds(partial(model.unet, *inputs)), 3)
        yield row


@section(180)
def notebooks(m: Machine) -> Iterator[dict]:
    """The notebooks by papermill, each in its own process; their kernels find the package here, installed or not."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    for name in m.sizes.notebooks:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "refined_ldm", "notebooks", name, "--out", folder]
            start, left = time.perf_counter(), max(1.0, m.left - 2)  # for its row to be written
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment)
                ended = "ran" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1][:200]
            except subprocess.TimeoutExpired:
                ended = "did not end in time"
        yield {"notebook": name, "ended": ended, "seconds": round(time.perf_counter() - start, 1)}


@section(480)
def training(m: Machine) -> Iterator[dict]:
    """Training of the U-Net of launch/tiny_details.yaml from the shipped weights, as long as there is time.

    Its learning rate falls to zero in any case, since the number of steps is chosen after 30 of them. The averaged
    weights are written to OUT/ldm.safetensors every SAVED seconds and at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        start, config = time.perf_counter(), m.sizes.details(Path(folder) / "start")
        settings, run = config.training["ldm"], Path(folder) / "run"

        def begin(**settings) -> tuple[RefinedAudioLDM, Iterator]:
            forget_accelerators()
            model = RefinedAudioLDM(config, clap=m.sizes.clap and Clap(m.sizes.clap)).to(m.device)
            return model, train_stage(model, "ldm", run, **settings)

        # the first run renders the clips and encodes them, and the second finds that done
        with closing(begin(max_steps=10**6)[1]) as steps:
            seconds = [step.seconds for step in islice(steps, 30)]
        prepared, pace = time.perf_counter() - start, statistics.median(seconds)
        count = max(2, min(settings.max_steps, int(0.9 * m.left / pace)))
        model, steps = begin(max_steps=count)
        losses, written = [], time.monotonic()
        for step in steps:
            losses.append(step.loss)
            if step.index == count or time.monotonic() - written > SAVED:
                with step.averaged():
                    model.save_part("ldm", m.out, torch.float16)
                written = time.monotonic()
    some = max(1, count // 10)
    means = (statistics.mean(part) for part in (losses[:some], losses[-some:]))
    first, last = (round(mean, 5) for mean in means)
    yield {"batch": settings.batch_size, "steps": count, "of": settings.max_steps, "ms a step": _three(1e3 * pace),
             "clips": config.clips, "rendering and encoding, s": round(prepared, 1), "loss of the first tenth": first,
            "of the last tenth": last}  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    """Draw where the time of the U-Net's steps goes: a bar for each batch size."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "whole step, ms" in row]
    parts = [k for k in rows[0] if k.endswith(", ms") and k != "whole step, ms"]
    figure, ax = plt.subplots(figsize=(8, 0.8 + 0.6 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for part in parts:
        ax.barh([str(row["batch"]) for row in rows], [row[part] / row["whole step, ms"] for row in rows], left=left,
                label=part.removesuffix(", ms"))  # fmt: skip
        left = [x + row[part] / row["whole step, ms"] for x, row in zip(left, rows, strict=True)]
    ax.set(xlabel="share of a training step", ylabel="batch", title="Where the time of a training step goes")
    ax.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class OutOfTime(BaseException):
    """A section reached its limit. No Exception, so that no `except` in a section takes it for a fault to mend."""


@contextmanager
def time_limit(seconds: float, again: float = 5.0) -> Iterator[None]:
    """Raise OutOfTime within the block after so many seconds, and `again` and again until it has ended.

    Python drops what is raised in a destructor, so that once may be lost.
    """

    def stop(number, frame):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(m: Machine, names: list[str], on_line: Callable[[str], None] = print) -> dict:
    """Run sections -> the contents of m.out/gpu.json, which is written after each row and at each section's end."""
    cuda = m.device.type == "cuda"
    found = {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count(), "sections": {},
    }  # fmt: skip
    m.out.mkdir(parents=True, exist_ok=True)

    def write():
        with atomic_write(m.out / "gpu.json") as path:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for name in names:
        function, limit = SECTIONS[name]
        start, left = time.perf_counter(), min(limit, m.ends - time.monotonic())
        m.section_ends = time.monotonic() + left
        found["sections"][name] = result = {"rows": []}
        on_line(name)
        try:
            if left < 1:
                raise OutOfTime("no time was left")
            with time_limit(left):
                for row in function(m):
                    result["rows"].append(row)
                    write()
                    on_line("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
        except (Exception, OutOfTime) as fault:  # noqa: BLE001 the other sections are still worth having
            result["failed"] = f"{type(fault).__name__}: {fault}"[:300]
        result["seconds"] = round(time.perf_counter() - start, 1)
        write()
        on_line(f"  {result.get('failed', 'ended')} after {result['seconds']} s")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure -> exit status: 1 if a section failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"), metavar="DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all sections together")
    parser.add_argument("--small", action="store_true", help="turn all sizes down, for a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    o = parser.parse_args(arguments)
    machine = Machine(pick_device(o.device), SMALL if o.small else Sizes(), time.monotonic() + o.seconds, o.out)
    found = measure(machine, o.only, partial(print, flush=True))
    return int(any("failed" in result for result in found["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
