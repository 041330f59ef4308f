"""The claim under control: arms that differ in what is named and in nothing else.

Every arm trains the same U-Net on the same latents of one frozen VAE, in the same batch order, with the same noise and
as many iterations. What differs is its `Arm`; what that does to a loss is on its card, and losses whose cards differ
are not compared. Judges are the noise error on a fixed held-out set, at fixed timesteps and with fixed noise; an
embedding nobody here trained; and the events the captions name.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.config import StageConfig, preset
from refined_ldm.data.caches import cache_latents, encoded_at_once
from refined_ldm.data.captioned_audio import loader
from refined_ldm.diffusion import add_noise
from refined_ldm.evaluation.adherence import (
    ProbedEmbedding,
    evaluate_embeddings,
    evaluate_generated,
    fit_probe,
    rendered_clips,
)
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import LinearProbe, frechet_distance, kernel_distance
from refined_ldm.experiment.arms import Card
from refined_ldm.experiment.conditioners import TOKENS, TOWERS, Oracle, Tokens, embedded_captions, embedded_sounds
from refined_ldm.experiment.pretraining import NAMES
from refined_ldm.files import atomic_write
from refined_ldm.integers import whole
from refined_ldm.randomness import step_seed
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.pipeline import cached_clips, fit_gaussian, weights_digest
from refined_ldm.vae import latent_scale

GRID = tuple(range(25, 1000, 50))  # timesteps at which the noise error is measured


@torch.no_grad()
def noise_errors(model, z_0, c, seed=0):
    """Squared error of the predicted noise (len(GRID), B), with the same noise at every timestep of GRID."""
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(seed)).to(z_0)
    rows = []
    for timestep in GRID:
        t = torch.full((len(z_0),), timestep, device=z_0.device)
        rows.append(((model.denoise(add_noise(z_0, eps, t, model.schedule), t, c) - eps) ** 2).flatten(1).mean(1))
    return torch.stack(rows)


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

    base: the model whose VAE and vocoder all arms have; config: that of the arms. files: {"laion": …, "ms": …}, where
    the conditioners are; by default folder/clap-NAME.safetensors, with "-plain" those without history
    (`prepare_conditioners`). wide: the U-Net of arms that ask for a wide one. `open_experiment` makes one for a preset.
    """

    def __init__(self, folder, config, base, files=None, tokenizer=None, held_out=64, judged=192, probe=1500,
                 on_clips=None, wide=None):  # fmt: skip
        self.judged, self.probe = whole("judged", judged, 2), whole("probe", probe, 2)
        held_out = whole("held_out", held_out, 2)
        self.folder, self.config, self.base, self.on_clips = Path(folder), config, base.eval(), on_clips
        self.towers = TOWERS["published" if files else "tiny"]
        self.files, self.tokenizer, self.wide = files or {}, tokenizer, wide or config.unet
        self.clips = cached_clips(config, folder, on_clips=on_clips)
        made_of = {**self.clips.made_of, "vae": weights_digest(base.vae)}
        self.latents = cache_latents(
            self.folder / "latents", self.clips, self._encode, _no_embedding, made_of, on_clips
        )
        self.scale = self._scale(range(min(512, config.clips)))
        self.held_out = rendered_clips(held_out, "val", seed=1, seconds=config.seconds)

    @property
    def device(self):
        """Where the models are."""
        return self.base.device

    @torch.no_grad()
    def _encode(self, waveform):
        return self.base.vae.encode(self.base.mel(waveform.to(self.device))).mean

    def _scale(self, rows):
        waveform = torch.stack([self.clips[i]["waveform"] for i in rows]).to(self.device)
        return float(latent_scale(self.base.vae, (self.base.mel(w) for w in waveform.split(self._at_once))))

    @property
    def _at_once(self):
        return encoded_at_once(self.config.samples)

    def scale_of(self, arm, seed):
        """The latent scale of an arm: one measured on 512 clips, or 1 / std of the first two clips that it sees."""
        if arm.scale_from == "fixed subset":
            return self.scale
        first = next(iter(loader(range(len(self.clips)), self._batch_size, seed).batch_sampler))[:2]
        return self._scale(first)

    def conditioner(self, arm):
        """The frozen conditioner of an arm."""
        if arm.conditioner == "oracle":
            known = [*self.clips.rest, *self.held_out, *self.test]
            return Oracle(known, self.config.unet.embedding_dim).to(self.device)
        kind, _, plain = arm.conditioner.partition("-")
        if kind == "random":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                clap = Clap(CLAP_PRESETS[self.towers["ms"]])
        else:
            path = self.files.get(kind) or self.folder / f"clap-{self.towers[kind]}{'-plain' * bool(plain)}.safetensors"
            clap = Clap.load(self.towers[kind], path, self.tokenizer if kind == "laion" else None)
        clap = clap.eval().to(self.device)
        return Tokens(clap) if arm.tokens else clap

    @property
    def test(self):
        """The test clips that sounds are judged by."""
        if not hasattr(self, "_test"):
            self._test = rendered_clips(self.judged, seconds=self.config.seconds)
        return self._test

    def listener(self):
        """The judge from outside and its probe, and what it hears in the test clips: (ProbedEmbedding, AdherenceResult)."""
        if not hasattr(self, "_listener"):
            kept, judge = self.folder / f"probe-{self.probe}-{self.judged}.npz", Aisfx.load().to(self.device)
            if kept.is_file():
                found = np.load(kept)
                probe = LinearProbe(NAMES, multi_label=True)
                probe.mean, probe.std, probe.weight, probe.bias = (found[k] for k in ("mean", "std", "weight", "bias"))
                self._listener, real = ProbedEmbedding(judge, probe), found["real"]
            else:
                self._listener = fit_probe(judge, self.probe, seconds=self.config.seconds)
                real = self._listener.embed_audio(torch.stack([item["waveform"] for item in self.test]))
                probe = self._listener.probe
                with atomic_write(kept) as temporary, temporary.open("wb") as file:
                    np.savez(file, mean=probe.mean, std=probe.std, weight=probe.weight, bias=probe.bias, real=real)
            self._real = evaluate_embeddings(self._listener, real, self.test)
        return self._listener, self._real

    def examples(self, arm, conditioner):
        """The training set of an arm."""
        name = arm.conditioner + "-tokens" * arm.tokens
        embeddings = embedded_captions(self.folder / f"embeddings-{name}", self.clips, conditioner.embed_text)
        heard = None
        if arm.audio_share:
            heard = embedded_sounds(self.folder / f"heard-{name}", self.clips, conditioner)
        return Examples(self.latents, embeddings, heard)

    def model(self, arm, seed, max_steps):
        """A fresh model of an arm, and its training set."""
        conditioner = self.conditioner(arm)
        examples = self.examples(arm, conditioner)
        warmup = min(100, max_steps // 10)
        steps = StageConfig(max(1, max_steps), self._batch_size, arm.lr, arm.optimizer, arm.lr_schedule, warmup,
                            ema_decay=arm.ema_decay, timesteps=arm.timesteps, loss_weighting=arm.loss_weighting,
                            audio_share=arm.audio_share, conditioner_dropout=arm.conditioner_dropout)  # fmt: skip
        width = conditioner.embedding_dim
        unet = self.wide if arm.wide else self.config.unet
        unet = replace(unet, embedding_dim=width, embedding_gain=arm.gain or width**0.5)
        if arm.tokens:
            unet = replace(unet, tokens=TOKENS, token_width=conditioner.clap.config.text_width)
        name = self.towers.get(arm.conditioner.partition("-")[0], self.towers["ms"])
        config = replace(self.config, clap=name, unet=unet, parameterization=arm.parameterization,
                         guidance_scale=arm.guidance, unconditional_probability=arm.drop,
                         training=self.config.training | {"ldm": steps})  # fmt: skip
        model = RefinedAudioLDM(config, seed, clap=conditioner)
        model.vae, model.vocoder, model.mel = self.base.vae, self.base.vocoder, self.base.mel
        model.scale.fill_(self.scale_of(arm, seed))
        model.to(self.device).eval()  # and so all but the U-Net stays: dropout would blur the conditioner's captions
        if model.gaussian is not None:
            known = [examples[i] for i in range(min(4000, len(examples)))]
            fit_gaussian(model, *(torch.stack([item[key] for item in known]) for key in ("latent", "embeddings")))
        return model, examples

    @property
    def _batch_size(self):
        return self.config.training["ldm"].batch_size

    def trained(self, run):
        """The model that a finished run left in this folder. Raises FileNotFoundError if it has not been run here."""
        model, _ = self.model(run.arm, run.seed, run.iterations)
        model.load_part("ldm", self.folder / "runs" / run.name)
        return model

    def held_out_latents(self):
        """Latents (B, C, T, F) of the held-out clips, not yet scaled."""
        if not hasattr(self, "_held_out_latents"):
            waveform = torch.stack([item["waveform"] for item in self.held_out])
            self._held_out_latents = torch.cat([self._encode(w) for w in waveform.split(self._at_once)])
        return self._held_out_latents

    def card(self, arm, model):
        """The card of an arm's losses."""
        drop = 1 - (1 - arm.drop) * (1 - arm.conditioner_dropout)
        weighting = "eps" if arm.loss_weighting == "eps" else arm.parameterization
        unet = model.config.unet
        return Card(round(float(model.scale), 6), arm.parameterization, weighting, arm.audio_share, drop,
                    unet.embedding_gain, unet.embedding_dim, arm.timesteps, f"val-{len(self.held_out)}")  # fmt: skip

    @torch.no_grad()
    def noise_error(self, model):
        """Mean squared error of the predicted noise on the held-out clips, at every timestep of GRID (len(GRID),)."""
        model.eval()
        z_0 = model.scale * self.held_out_latents()
        c = model.clap.embed_text([item["caption"] for item in self.held_out])
        return noise_errors(model, z_0, c, step_seed(0, 0)).mean(1).cpu().numpy()

    def quality(self, model, guidance=None, steps=16):
        """What the listener hears in sounds made from the test captions -> ({measure: number}, AdherenceResult).

        guidance: None takes the arm's.
        """
        listener, real = self.listener()
        judged = evaluate_generated(listener, model, self.test, guidance, steps, batch_size=16)
        return {**_measures(judged, real, [item["kind"] for item in self.test])}, judged


def open_experiment(folder, name="tiny", clips=None, audioldm="", laion="", ms="", tokenizer="", device="cpu",
                    **settings):  # fmt: skip
    """The experiment of a preset -> Experiment.

    tiny: the shipped VAE and vocoder, conditioners trained here, a small U-Net. colab, paper: those of a published
    AudioLDM (`audioldm`, a file or a folder), with the published conditioners (`laion`, with the folder of its
    `tokenizer`, and `ms`). Raises ValueError naming what is missing.
    """
    config = preset(name) if clips is None else preset(name, clips=clips)
    if name == "tiny":
        small = replace(config.unet, model_channels=32, norm_groups=8, head_channels=32)
        base = RefinedAudioLDM.from_preset("tiny", device)
        return Experiment(folder, replace(config, unet=small), base, wide=config.unet, **settings)
    given = {"audioldm": audioldm, "laion": laion, "ms": ms, "tokenizer": tokenizer}
    if missing := [key for key, path in given.items() if not path]:
        raise ValueError(f"preset {name} needs published files: give {', '.join(missing)}")
    base = RefinedAudioLDM.from_audioldm(audioldm, clap_checkpoint=laion, tokenizer=tokenizer, device=device)
    config = replace(config, mel=base.config.mel, vae=base.config.vae, hifigan=base.config.hifigan)
    return Experiment(folder, config, base, {"laion": laion, "ms": ms}, tokenizer, **settings)


def _measures(judged, real, kinds):
    """Distances to the real clips of the same captions, and the share of the captioned classes that is heard."""
    one = np.array(kinds) == "event"
    return {
        "frechet": frechet_distance(judged.embeddings, real.embeddings, min(64, len(kinds) - 1)),
        "kernel": kernel_distance(judged.embeddings, real.embeddings, "gaussian"),
        "recall": float(judged.recall.mean()), "recall_one": float(judged.recall[one].mean()),
    }  # fmt: skip


def _no_embedding(captions):
    return torch.zeros(len(captions), 1)
