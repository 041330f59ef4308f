"""The claim under control: arms that differ in what is named and in nothing else.

Every arm trains the same U-Net on the same latents of one frozen VAE, in the same batch order, with the same noise and
as many iterations. What differs is its `Arm`; what that does to a loss is on its card, and losses whose cards differ
are not compared. Judges are the noise error on a fixed held-out set, at fixed timesteps and with fixed noise; an
embedding nobody here trained; and the events the captions name.
"""

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from refined_ldm.atomic import written_whole
from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.config import StageConfig, preset
from refined_ldm.curve import Curve
from refined_ldm.data import cache_latents, loader
from refined_ldm.diffusion import add_noise
from refined_ldm.evaluation import Listener, fit_probe, judge_embeddings, judge_generated, rendered_clips
from refined_ldm.histories import HISTORIES, train_conditioner
from refined_ldm.judges import Aisfx
from refined_ldm.metrics import LinearProbe, frechet_distance, kernel_distance
from refined_ldm.pipeline import cached_clips, fit_gaussian
from refined_ldm.probes import names_in_order
from refined_ldm.randomness import step_seed
from refined_ldm.scenes import CLASSES
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.train import train_ldm
from refined_ldm.vae import latent_scale

NAMES = tuple(sorted(CLASSES))
GRID = tuple(range(25, 1000, 50))  # timesteps at which the noise error is measured
TOKENS = 20  # of a caption that cross-attention sees


@dataclass(frozen=True)
class Arm:
    """One way to train the U-Net. The defaults are arm B: AudioLDM's recipe with its defects mended, and tuned."""

    conditioner: str = "laion"  # or "ms", each with its history, or "-plain" without; "random"; "oracle"
    tokens: bool = False  # cross-attention on the states of the text tower beside the pooled embedding
    parameterization: str = "v"  # which gains a tuned baseline most; AudioLDM predicts eps
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    ema_decay: float = 0.999
    gain: float = 16.0  # norm that embeddings of unit length are given: sqrt(D), or 1 as LAION's
    timesteps: str = "stratified"
    weighting: str = "own"
    drop: float = 0.1  # captions blanked for guidance
    extra_drop: float = 0.0  # and those the conditioner blanks beside them, which it never stops
    audio_share: float = 0.0  # of clips steered by their own sound
    scale_from: str = "fixed subset"  # or "first batch"
    guidance: float = 3.0  # of the sounds that are judged


PUBLISHED = Arm(parameterization="eps", lr=1e-4, lr_schedule="constant", ema_decay=0.9999, gain=1.0,
                timesteps="uniform", extra_drop=0.1, audio_share=0.5, scale_from="first batch")  # fmt: skip
RECIPE = {"parameterization": "caption-gaussian", "optimizer": "muon", "lr": 3e-3, "guidance": 1.5}
ARMS = {
    "A": PUBLISHED,
    "B": Arm(),
    "C": Arm("ms"),
    "D": Arm("ms", **RECIPE),
    "E": Arm(**RECIPE),
    "random": Arm("random", **RECIPE),
    "oracle": Arm("oracle", **RECIPE),
    "tokens": Arm("ms", tokens=True, **RECIPE),
    "plain": Arm("ms-plain", **RECIPE),
}


CLAP_RATES = {"laion": 5e-4, "ms": 1e-3}  # of the contrastive stage, each its own best
TOWERS = {  # the two conditioners in miniature, and as published
    "tiny": {"laion": "tiny-roberta", "ms": "tiny-gpt2"},
    "published": {"laion": "laion-clap", "ms": "ms-clap-2023"},
}


# The recipe with one ingredient taken out, and the baseline with one put in: what each is worth.
LADDER = {
    "D": {},
    "D, formula deaf to captions": {"parameterization": "gaussian", "guidance": 3.0},
    "D, no formula": {"parameterization": "v", "guidance": 3.0},
    "D, AdamW": {"optimizer": "adamw", "lr": 1e-3},
    "D, faint captions": {"gain": 1.0},
    "D, uniform timesteps": {"timesteps": "uniform"},
    "D, last weights": {"ema_decay": 0.0},
    "C": ARMS["C"].__dict__,
}
RATES = (1e-3, 3e-3, 1e-2)  # of which the baseline's was taken


@dataclass(frozen=True)
class Run:
    """One training of the plan: an arm, what is changed in it, for how long, and its seed."""

    label: str
    arm: Arm
    iterations: int
    seed: int
    part: str  # formula, arms, target, controls, plateau, ladder or rates

    @property
    def name(self):
        """What its files are called."""
        return f"{self.label}-{self.iterations}-{self.seed}".replace(", ", "-").replace(" ", "-")


def plan(iterations=1500, seeds=3):
    """Every run of the experiment, the most telling ones first."""
    runs, short = [], [iterations // k for k in (10, 5, 3)]
    runs += [Run("C", replace(ARMS["C"], lr=lr), iterations // 3, 0, "rates") for lr in RATES]
    runs = [replace(run, label=f"C lr {run.arm.lr:g}") for run in runs]
    runs.append(Run("D", ARMS["D"], 0, 0, "formula"))  # its U-Net has learned nothing
    for seed in range(seeds):
        runs += [Run(label, ARMS[label], iterations, seed, "arms") for label in "CBA"]
        runs += [Run("D", ARMS["D"], n, seed, "target") for n in short] + [
            Run("E", ARMS["E"], short[0], seed, "target")
        ]
    for seed in range(seeds):
        runs += [Run(label, ARMS[label], iterations, seed, "arms") for label in "DE"]
    runs += [Run(label, ARMS[label], iterations, 0, "controls") for label in ("tokens", "oracle", "random", "plain")]
    runs += [Run(label, replace(ARMS["D"], **change), short[1], 0, "ladder") for label, change in LADDER.items()
             if change]  # fmt: skip
    return [*runs, Run("B", ARMS["B"], 4 * iterations, 0, "plateau")]


@dataclass(frozen=True)
class Card:
    """What the numbers of a loss depend on beside the model being good."""

    scale: float  # latents are multiplied by it: the noise levels of a run
    parameterization: str  # what is predicted
    weighting: str  # of timesteps in the mean
    audio_share: float  # conditioning mix
    drop: float  # of conditions, all reasons together
    norm: float  # of an embedding
    width: int  # D of an embedding
    timesteps: str  # how they are drawn
    held_out: str  # the clips of the validation loss


TRAINING_LOSS = tuple(Card.__dataclass_fields__)
VALIDATION_LOSS = ("scale", "held_out")  # captions only, none blanked, converted to eps, on fixed timesteps


def comparable(a, b, fields=VALIDATION_LOSS, but=()):
    """Raise ValueError, naming every difference, unless two cards agree in `fields`; `but`: what is under test."""
    different = [name for name in fields if name not in but and not _same(getattr(a, name), getattr(b, name))]
    if different:
        told = "; ".join(f"{name}: {getattr(a, name)} and {getattr(b, name)}" for name in different)
        raise ValueError(f"these losses cannot be compared, the runs differ in {told}")


def _same(a, b):
    return abs(a - b) < 1e-6 * max(1, abs(a)) if isinstance(a, float) else a == b


class Tokens(nn.Module):
    """A conditioner that gives, behind its embedding, the states of its text tower: (B, D + TOKENS * W)."""

    def __init__(self, clap):
        super().__init__()
        self.clap, self.embedding_dim = clap, clap.embedding_dim

    def embed_text(self, captions):
        states, mask = self.clap.text_states(captions)
        states = (states * mask[..., None])[:, :TOKENS]
        states = nn.functional.pad(states, (0, 0, 0, TOKENS - states.shape[1]))
        return torch.cat([self.clap.embed_text(captions), states.flatten(1)], dim=1)


class Oracle(nn.Module):
    """Knows from the metadata which classes a caption names, in the order of their onsets: no reading, no error."""

    def __init__(self, items, embedding_dim):
        super().__init__()
        self.embedding_dim, self.known = embedding_dim, {"": ()}
        for item in items:
            names = [name for name in names_in_order(item) if name in item["labels"]]
            self.known |= {caption: (item["kind"], *names) for caption in item["captions"]}

    def embed_text(self, captions):
        rows = torch.zeros(len(captions), self.embedding_dim)
        for row, caption in zip(rows, captions, strict=True):
            for place, name in enumerate(self.known[caption][1:]):
                row[place * len(NAMES) + NAMES.index(name)] = 1
            if self.known[caption]:
                row[-1 - ("event", "sequence", "overlap").index(self.known[caption][0])] = 1
        return nn.functional.normalize(rows, dim=1)


class Examples(Dataset):
    """Latents beside the embeddings of their captions and of their own sounds."""

    def __init__(self, latents, embeddings, heard=None):
        self.latents, self.embeddings, self.heard = latents, embeddings, heard

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        item = {"latent": self.latents[index]["latent"], "embeddings": self.embeddings[index]["embeddings"]}
        return item | ({} if self.heard is None else {"audio_embedding": self.heard[index]["embeddings"][0]})


class Experiment:
    """What all arms share, computed once into `folder`: clips, latents, their scale, held-out clips, the listener.

    folder/clap-NAME.safetensors: the conditioners (`histories.train_conditioner`), with "-plain" those without history.
    """

    def __init__(self, folder, clips=8000, held_out=64, judged=192, probe=1500, width=32, on_clips=None):
        self.folder, self.on_clips, self.towers = Path(folder), on_clips, TOWERS["tiny"]
        self.config = preset("tiny", clips=clips)
        unet = replace(self.config.unet, model_channels=width, norm_groups=8, head_channels=32)
        self.config = replace(self.config, unet=unet)
        self.base = RefinedAudioLDM.from_preset("tiny")
        self.clips = cached_clips(self.config, folder, on_clips=on_clips)
        self.latents = self._encoded(self.clips, "latents")
        self.scale = self._scale(range(min(512, clips)))
        self.held_out = rendered_clips(held_out, "val", seed=1)
        self.judged, self.probe = judged, probe

    def _encoded(self, clips, name):
        made_of = {**clips.made_of, "vae": "tiny"}
        return cache_latents(self.folder / name, clips, self._encode, lambda c: torch.zeros(len(c), 1), made_of,
                             self.on_clips)  # fmt: skip

    @torch.no_grad()
    def _encode(self, waveform):
        return self.base.vae.encode(self.base.mel(waveform)).mean

    def _scale(self, rows):
        waveform = torch.stack([self.clips[i]["waveform"] for i in rows])
        return float(latent_scale(self.base.vae, (self.base.mel(w) for w in waveform.split(32))))

    def scale_of(self, arm, seed):
        """The latent scale of an arm: one measured on 512 clips, or 1 / std of the first two clips that it sees."""
        if arm.scale_from == "fixed subset":
            return self.scale
        first = next(iter(loader(range(len(self.clips)), 16, seed).batch_sampler))[:2]
        return self._scale(first)

    def conditioner(self, arm):
        """The frozen conditioner of an arm."""
        if arm.conditioner == "oracle":
            return Oracle([*self.clips.rest, *self.held_out, *self.test], self.config.unet.embedding_dim)
        if arm.conditioner == "random":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                clap = Clap(CLAP_PRESETS["tiny-gpt2"]).eval()
        else:
            kind, _, plain = arm.conditioner.partition("-")
            tower = self.towers[kind]
            path = self.folder / f"clap-{tower}{'-plain' if plain else ''}.safetensors"
            clap = Clap.load(tower, path).eval()
        return Tokens(clap) if arm.tokens else clap

    @property
    def test(self):
        """The test clips that sounds are judged by."""
        if not hasattr(self, "_test"):
            self._test = rendered_clips(self.judged)
        return self._test

    def listener(self):
        """The judge from outside and its probe, and what it hears in the test clips: (Listener, Judged)."""
        if not hasattr(self, "_listener"):
            kept, judge = self.folder / f"probe-{self.probe}-{self.judged}.npz", Aisfx.load()
            if kept.is_file():
                found = np.load(kept)
                probe = LinearProbe(NAMES, multi_label=True)
                probe.mean, probe.std, probe.weight, probe.bias = (found[k] for k in ("mean", "std", "weight", "bias"))
                self._listener, real = Listener(judge, probe), found["real"]
            else:
                self._listener = fit_probe(judge, self.probe)
                real = self._listener.embed(torch.stack([item["waveform"] for item in self.test]))
                probe = self._listener.probe
                with written_whole(kept) as temporary, temporary.open("wb") as file:
                    np.savez(file, mean=probe.mean, std=probe.std, weight=probe.weight, bias=probe.bias, real=real)
            self._real = judge_embeddings(self._listener, real, self.test)
        return self._listener, self._real

    def examples(self, arm, conditioner):
        """The training set of an arm."""
        name = arm.conditioner + "-tokens" * arm.tokens
        embeddings = _embedded(self.folder / f"embeddings-{name}", self.clips, conditioner.embed_text)
        heard = None
        if arm.audio_share:
            heard = _heard(self.folder / f"heard-{name}", self.clips, conditioner)
        return Examples(self.latents, embeddings, heard)

    def model(self, arm, seed, max_steps):
        """A fresh model of an arm, and its training set."""
        conditioner = self.conditioner(arm)
        examples = self.examples(arm, conditioner)
        steps = StageConfig(max(1, max_steps), 16, arm.lr, arm.optimizer, arm.lr_schedule, min(100, max_steps // 10),
                            ema_decay=arm.ema_decay, timesteps=arm.timesteps, weighting=arm.weighting,
                            audio_share=arm.audio_share, extra_drop=arm.extra_drop)  # fmt: skip
        unet = replace(self.config.unet, embedding_gain=arm.gain)
        if arm.tokens:
            unet = replace(unet, tokens=TOKENS, token_width=conditioner.clap.config.text_width)
        config = replace(self.config, unet=unet, parameterization=arm.parameterization,
                         guidance_scale=arm.guidance, unconditional_probability=arm.drop,
                         training=self.config.training | {"ldm": steps})  # fmt: skip
        model = RefinedAudioLDM(config, seed, clap=conditioner)
        model.vae, model.vocoder, model.mel = self.base.vae, self.base.vocoder, self.base.mel
        model.scale.fill_(self.scale_of(arm, seed))
        model.eval()  # and so it stays but for the U-Net: a conditioner's dropout would blur its captions
        if model.gaussian is not None:
            known = [examples[i] for i in range(min(4000, len(examples)))]
            fit_gaussian(model, *(torch.stack([item[key] for item in known]) for key in ("latent", "embeddings")))
        return model, examples

    def trained(self, run):
        """The model that a finished run left in this folder. Raises FileNotFoundError if it has not been run here."""
        model, _ = self.model(run.arm, run.seed, run.iterations)
        model.load_part("ldm", self.folder / "runs" / run.name)
        return model

    def held_out_latents(self):
        """Latents (B, C, T, F) of the held-out clips, not yet scaled."""
        if not hasattr(self, "_held_out_latents"):
            waveform = torch.stack([item["waveform"] for item in self.held_out])
            self._held_out_latents = torch.cat([self._encode(w) for w in waveform.split(32)])
        return self._held_out_latents

    def card(self, arm, model):
        """The card of an arm's losses."""
        drop = 1 - (1 - arm.drop) * (1 - arm.extra_drop)
        weighting = "eps" if arm.weighting == "eps" else arm.parameterization
        return Card(round(float(model.scale), 6), arm.parameterization, weighting, arm.audio_share, drop, arm.gain,
                    self.config.unet.embedding_dim, arm.timesteps, f"val-{len(self.held_out)}")  # fmt: skip

    @torch.no_grad()
    def noise_error(self, model):
        """Mean squared error of the predicted noise on the held-out clips, at every timestep of GRID (len(GRID),)."""
        model.eval()
        z_0 = model.scale * self.held_out_latents()
        c = model.clap.embed_text([item["caption"] for item in self.held_out])
        eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(step_seed(0, 0)))
        errors = []
        for timestep in GRID:
            t = torch.full((len(z_0),), timestep)
            predicted = model.denoise(add_noise(z_0, eps, t, model.schedule), t, c)
            errors.append(float(((predicted - eps) ** 2).mean()))
        return np.array(errors)

    def quality(self, model, steps=16):
        """What the listener hears in sounds made from the test captions -> ({measure: number}, Judged)."""
        listener, real = self.listener()
        judged = judge_generated(listener, model, self.test, steps=steps, batch_size=16)
        return {**_measures(judged, real, [item["kind"] for item in self.test])}, judged


def prepare_conditioners(experiment, runs, seed=0, on_step=None):
    """Train the conditioners that runs need and the folder does not hold yet, with their histories or plain."""
    wanted = {run.arm.conditioner for run in runs}
    for kind, tower in experiment.towers.items():
        for plain in ("", "-plain"):
            path = experiment.folder / f"clap-{tower}{plain}.safetensors"
            if kind + plain not in wanted or path.is_file():
                continue
            clap = replace(experiment.config.training["clap"], max_steps=800, batch_size=32, lr=CLAP_RATES[kind])
            config = replace(experiment.config, clap=tower, training=experiment.config.training | {"clap": clap})
            model, run_dir = RefinedAudioLDM(config, seed), experiment.folder / f"{tower}{plain}"
            history = None if plain else HISTORIES[tower]
            with ExitStack() as stack:
                curves = {}
                for stage, step in train_conditioner(model, experiment.clips, history, seed, run_dir, resume=True):
                    if stage not in curves:
                        curves[stage] = stack.enter_context(Curve(run_dir / f"{stage}.csv", resume=True))
                    curves[stage](step)
                    if on_step:
                        on_step(stage, step)
            model.clap.save(path)


def _measures(judged, real, kinds):
    """Distances to the real clips of the same captions, and the share of the captioned classes that is heard."""
    one = np.array(kinds) == "event"
    return {
        "frechet": frechet_distance(judged.embeddings, real.embeddings, min(64, len(kinds) - 1)),
        "kernel": kernel_distance(judged.embeddings, real.embeddings, "gaussian"),
        "recall": float(judged.recall.mean()), "recall_one": float(judged.recall[one].mean()),
    }  # fmt: skip


def _embedded(folder, clips, embed):
    """Embeddings of every caption, cached: a shape of its own beside one set of latents."""
    return cache_latents(folder, clips, lambda w: torch.zeros(len(w), 1), embed, {**clips.made_of, "of": folder.name})


def _heard(folder, clips, clap):
    """Embeddings of the sounds themselves, cached under the same key."""

    class Sounds(Dataset):
        def __len__(self):
            return len(clips)

        def __getitem__(self, index):
            return clips[index] | {"captions": [str(index)]}

    def embed(indices):
        waveform = torch.stack([clips[int(i)]["waveform"] for i in indices])
        return clap.embed_audio(waveform, 16_000)

    made_of = {**clips.made_of, "of": folder.name}
    return cache_latents(folder, Sounds(), lambda w: torch.zeros(len(w), 1), embed, made_of)


def marks(max_steps, count=12):
    """Iterations at which the noise error is measured: nearly even in their logarithm, the last one included."""
    found = np.unique(np.geomspace(max(1, max_steps // 100), max_steps, count).round().astype(int))
    return set(found.tolist())


def run_arm(experiment, run, out, resume=False, judge=True, on_step=None):
    """Carry out one `Run`: train and judge -> its record, which is written to out/NAME.json beside the run's tables.

    NAME-steps.csv: the training loss of every iteration; NAME.csv: the noise error at marked iterations and timesteps.
    A finished run is not repeated, a broken one goes on from its checkpoint.
    """
    name, arm, seed, max_steps = run.name, run.arm, run.seed, run.iterations
    out, run_dir = Path(out), experiment.folder / "runs" / name
    if (out / f"{name}.json").is_file():
        return json.loads((out / f"{name}.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    model, examples = experiment.model(arm, seed, max_steps)
    errors = run_dir / "errors.csv"
    rows = pd.read_csv(errors).to_dict("records") if resume and errors.is_file() else []
    if not rows and model.gaussian is not None:  # the U-Net's last layer begins at zero: the formula alone
        rows = _error_rows(experiment.noise_error(model), 0, 0.0)
    seconds = 0.0
    if max_steps:
        rows, seconds = _trained(experiment, model, examples, run, run_dir, rows, resume, on_step)
    record = {"name": name, "label": run.label, "part": run.part, "seed": seed, "iterations": max_steps,
              "seconds": round(seconds, 1), **_bins(rows[-len(GRID):]), "arm": asdict(arm),
              "card": asdict(experiment.card(arm, model))}  # fmt: skip
    if judge:
        begin = time.perf_counter()
        measures, judged = experiment.quality(model)
        record |= measures | {"judged": len(judged.rows), "judging_seconds": round(time.perf_counter() - begin, 1)}
        _write(pd.DataFrame(judged.rows)[["id", "kind", "labels", "heard", "recall"]], out / f"{name}-heard.csv")
    model.save_part("ldm", run_dir)
    if max_steps:
        _write(_thinned(pd.read_csv(run_dir / "steps.csv")), out / f"{name}-steps.csv")
    _write(pd.DataFrame(rows), out / f"{name}.csv")
    with written_whole(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))
    return record


def _trained(experiment, model, examples, run, run_dir, rows, resume, on_step):
    """Train the model of a run -> the noise errors on the way and at the end, seconds."""
    at, seconds = marks(run.iterations), rows[-1]["seconds"] if rows else 0.0
    steps = train_ldm(model, loader(examples, 16, run.seed), seed=run.seed, run_dir=run_dir, resume=resume)
    with Curve(run_dir / "steps.csv", resume) as write:
        for step in steps:
            write(step)
            rows = [row for row in rows if row["step"] < step.index]  # what comes after the checkpoint is done again
            seconds += step.seconds
            if step.index in at and step.index < run.iterations:
                with step.averaged():
                    rows += _error_rows(experiment.noise_error(model), step.index, seconds)
                model.unet.train()
                pd.DataFrame(rows).to_csv(run_dir / "errors.csv", index=False)
            if on_step:
                on_step(step)
    seconds = float(pd.read_csv(run_dir / "steps.csv")["seconds"].sum())
    return rows + _error_rows(experiment.noise_error(model), run.iterations, seconds), seconds


def _error_rows(errors, step, seconds):
    return [{"step": step, "seconds": round(seconds, 2), "t": t, "error": float(f"{e:.6g}")}
            for t, e in zip(GRID, errors, strict=True)]  # fmt: skip


def _bins(rows):
    """The mean noise error over timesteps, and over those from 250, 500 and 750 on."""
    found = {}
    for low in (0, 250, 500, 750):
        found[f"error_{low}"] = float(np.mean([row["error"] for row in rows if row["t"] >= low]))
    return found


def _thinned(table, every=10):
    """Means over `every` iterations: a curve that is drawn needs no more."""
    groups = (table["step"] - 1) // every
    step, loss, seconds = (table[column].groupby(groups) for column in ("step", "loss", "seconds"))
    return pd.DataFrame({"step": step.max(), "loss": loss.mean().round(6), "seconds": seconds.sum().round(3)})


def _write(table, path):
    with written_whole(path) as temporary:
        table.to_csv(temporary, index=False)


def collect(out):
    """The records of all finished runs as a table, one row each, with what their CSV files say -> DataFrame.

    Noise errors and recalls are computed from the files, not taken from the record.
    """
    rows = []
    for path in sorted(Path(out).glob("*.json")):
        record = json.loads(path.read_text())
        errors = pd.read_csv(path.with_suffix(".csv"))
        last = errors[errors["step"] == errors["step"].max()]
        row = {k: v for k, v in record.items() if not isinstance(v, dict)}
        row["conditioner"] = record["arm"]["conditioner"]
        row |= _bins(last.to_dict("records"))
        heard = path.with_name(f"{path.stem}-heard.csv")
        if heard.is_file():
            table = pd.read_csv(heard)
            row["recall"] = table["recall"].mean()
            row["recall_one"] = table["recall"][table["kind"] == "event"].mean()
        rows.append(row)
    return pd.DataFrame(rows)
