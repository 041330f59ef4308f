"""The controlled experiment on the claim: what all arms share, and how each of them is trained and evaluated.

Every arm trains the same U-Net on the same latents of one frozen VAE, in the same batch order, with the same noise, for
as many iterations. What differs is its `Arm`; what that changes about a loss is on its `Card`, and losses whose cards
differ are not compared. The measures are the noise error on a fixed held-out set, at fixed timesteps and with fixed
noise; distances in an embedding that nobody here trained; and the events that the captions name. Notebook: 06
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from refined_ldm.base.files import atomic_write
from refined_ldm.base.integers import whole
from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.config import Config, StageConfig, preset
from refined_ldm.data.batches import loader
from refined_ldm.data.caches import cache_latents, encoded_at_once
from refined_ldm.devices import machine_kind, pick_accelerator
from refined_ldm.diffusion import add_noise
from refined_ldm.evaluation.adherence import (
    AdherenceResult,
    ProbedEmbedding,
    Progress,
    evaluate_embeddings,
    evaluate_generated,
    fit_probe,
    rendered_clips,
)
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.details import classify_details, select_scenes
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import LinearProbe, frechet_distance, kernel_distance
from refined_ldm.experiment.arms import PRECISIONS, Arm, Card, Run
from refined_ldm.experiment.conditioners import (
    TOKENS,
    TOWERS,
    Oracle,
    Tokens,
    embedded_captions,
    embedded_sounds,
    no_embedding,
)
from refined_ldm.experiment.pretraining import NAMES
from refined_ldm.randomness import step_seed
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.inputs import cached_clips, fit_gaussian
from refined_ldm.unet import UNetConfig
from refined_ldm.vae import latent_scale
from refined_ldm.weights import weights_digest

GRID = tuple(range(25, 1000, 50))  # timesteps at which the noise error is measured


@torch.no_grad()
def noise_errors(model: RefinedAudioLDM, z_0: torch.Tensor, c: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Squared error of the predicted noise (len(GRID), B), with the same noise at every timestep of GRID.

    z_0: scaled latents (B, C, T, F); c: embeddings (B, D).
    """
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(seed)).to(z_0)
    rows = []
    for timestep in GRID:
        t = torch.full((len(z_0),), timestep, device=z_0.device)
        rows.append(((model.denoise(add_noise(z_0, eps, t, model.schedule), t, c) - eps) ** 2).flatten(1).mean(1))
    return torch.stack(rows)


class Examples(Dataset):
    """Latents with the embeddings of their captions and, if `audio_embeddings` is given, of their own sounds."""

    def __init__(self, latents: Dataset, embeddings: Dataset, audio_embeddings: Dataset | None = None):
        self.latents, self.embeddings, self.audio_embeddings = latents, embeddings, audio_embeddings

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        item = {"latent": self.latents[index]["latent"], "embeddings": self.embeddings[index]["embeddings"]}
        if self.audio_embeddings is not None:
            item["audio_embedding"] = self.audio_embeddings[index]["embeddings"][0]
        return item


class Experiment:
    """The part that arms share, computed once into `folder`: clips, latents, their scale, held-out clips, evaluation.

    base: the model whose VAE and vocoder all arms have; config: that of the arms. files: {"laion": …, "ms": …}, the
    paths of published conditioners; by default folder/clap-NAME.safetensors, with "-plain" for those that were not
    pretrained (`prepare_conditioners`). held_out, test_size, probe: numbers of clips for the noise error, for the
    sounds, and for the fit of the probe. preset_unet: the U-Net of arms with unet="preset". `open_experiment` makes an
    experiment for a preset.
    """

    def __init__(self, folder: str | Path, config: Config, base: RefinedAudioLDM, files: dict | None = None,
                 tokenizer: str | Path | None = None, held_out: int = 64, test_size: int = 192, probe: int = 1500,
                 on_clips: Progress | None = None, preset_unet: UNetConfig | None = None):  # fmt: skip
        self.test_size, self.probe = whole("test_size", test_size, 2), whole("probe", probe, 2)
        held_out = whole("held_out", held_out, 2)
        self.folder, self.config, self.base, self.on_clips = Path(folder), config, base.eval(), on_clips
        self.towers = TOWERS["published" if files else "tiny"]
        self.files, self.tokenizer, self.preset_unet = files or {}, tokenizer, preset_unet or config.unet
        self.clips = cached_clips(config, folder, on_clips=on_clips)
        made_of = {**self.clips.made_of, "vae": weights_digest(base.vae)}
        self.latents = cache_latents(self.folder / "latents", self.clips, self._encode, no_embedding, made_of, on_clips)
        self.scale = self._scale(range(min(512, config.clips)))
        self.held_out = rendered_clips(held_out, "val", seed=1, seconds=config.seconds)

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.base.device

    @torch.no_grad()
    def _encode(self, waveform):
        return self.base.vae.encode(self.base.mel(waveform.to(self.device))).mean

    def _batches(self, items):
        return torch.stack([item["waveform"] for item in items]).split(encoded_at_once(self.config.samples))

    def _scale(self, rows):
        batches = self._batches(self.clips[i] for i in rows)
        return float(latent_scale(self.base.vae, (self.base.mel(w.to(self.device)) for w in batches)))

    def scale_of(self, arm: Arm, seed: int) -> float:
        """The latent scale of an arm: 1 / std of 512 fixed clips, or of the first two clips that it trains on."""
        if arm.scale_from == "fixed subset":
            return self.scale
        first = next(iter(loader(range(len(self.clips)), self._batch_size, seed).batch_sampler))[:2]
        return self._scale(first)

    def conditioner(self, arm: Arm) -> torch.nn.Module:
        """The frozen conditioner of an arm. Raises FileNotFoundError if it has not been trained here."""
        if arm.conditioner == "oracle":
            known = [*self.clips.rest, *self.held_out, *self.test]
            return Oracle(known, self.config.unet.embedding_dim).to(self.device)
        if arm.conditioner == "random":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                clap = Clap(CLAP_PRESETS[self.towers["ms"]]).eval().to(self.device)
        else:
            clap = self.trained_clap(arm.conditioner)
        return Tokens(clap) if arm.tokens else clap

    def clap_path(self, conditioner: str) -> Path:
        """The file of a conditioner: a published one where it was given, else that of its training in this folder."""
        kind, *history = conditioner.split("-")
        own = "-".join(["clap", self.towers[kind], *history])
        return Path(self.files.get(conditioner) or self.folder / f"{own}.safetensors")

    def trained_clap(self, conditioner: str) -> Clap:
        """Load a conditioner by its name in `Arm`. Raises FileNotFoundError if it has not been trained here."""
        kind = conditioner.partition("-")[0]
        tokenizer = self.tokenizer if kind == "laion" else None
        return Clap.load(self.towers[kind], self.clap_path(conditioner), tokenizer).eval().to(self.device)

    @cached_property
    def test(self) -> list[dict]:
        """The test clips, whose captions every arm makes sounds of."""
        return rendered_clips(self.test_size, seconds=self.config.seconds)

    def probed(self) -> tuple[ProbedEmbedding, AdherenceResult]:
        """The outside embedding with its probe, and its result on the test clips themselves; both are kept."""
        if not hasattr(self, "_probed"):
            kept, embed = self.folder / f"probe-{self.probe}-{self.test_size}.npz", Aisfx.load().to(self.device)
            names = ("mean", "std", "weight", "bias")
            if kept.is_file():
                stored = np.load(kept)
                probe = LinearProbe(NAMES, multi_label=True)
                for name in names:
                    setattr(probe, name, stored[name])
                self._probed, real = ProbedEmbedding(embed, probe), stored["real"]
            else:
                self._probed = fit_probe(embed, self.probe, seconds=self.config.seconds)
                real = self._probed.embed_audio(torch.stack([item["waveform"] for item in self.test]))
                with atomic_write(kept) as temporary, temporary.open("wb") as file:
                    np.savez(file, **{name: getattr(self._probed.probe, name) for name in names}, real=real)
            self._real = evaluate_embeddings(self._probed, real, self.test)
        return self._probed, self._real

    def examples(self, arm: Arm, conditioner: torch.nn.Module) -> Examples:
        """The training set of an arm."""
        name = arm.conditioner + "-tokens" * arm.tokens
        embeddings = embedded_captions(self.folder / f"embeddings-{name}", self.clips, conditioner.embed_text)
        sounds = embedded_sounds(self.folder / f"sounds-{name}", self.clips, conditioner) if arm.audio_share else None
        return Examples(self.latents, embeddings, sounds)

    def model(self, arm: Arm, seed: int, max_steps: int) -> tuple[RefinedAudioLDM, Examples]:
        """An untrained model of an arm, and its training set."""
        conditioner = self.conditioner(arm)
        examples = self.examples(arm, conditioner)
        warmup = min(100, max_steps // 10) if arm.lr_schedule == "cosine" else 100  # whose lengths share a beginning
        steps = StageConfig(max(1, max_steps), self._batch_size, arm.lr, arm.optimizer, arm.lr_schedule, warmup,
                            ema_decay=arm.ema_decay, timesteps=arm.timesteps, loss_weighting=arm.loss_weighting,
                            audio_share=arm.audio_share, conditioner_dropout=arm.conditioner_dropout)  # fmt: skip
        width = conditioner.embedding_dim
        unet = self.preset_unet if arm.unet == "preset" else self.config.unet
        unet = replace(unet, embedding_dim=width, embedding_gain=arm.gain or width**0.5)
        if arm.tokens:
            unet = replace(unet, tokens=TOKENS, token_width=conditioner.clap.config.text_width)
        name = self.towers.get(arm.conditioner.partition("-")[0], self.towers["ms"])
        config = replace(self.config, clap=name, unet=unet, parameterization=arm.parameterization,
                         guidance_scale=arm.guidance, unconditional_probability=arm.drop, steps=15, candidates=1,
                         training=self.config.training | {"ldm": steps})  # fmt: skip
        model = RefinedAudioLDM(config, seed, clap=conditioner)
        model.vae, model.vocoder, model.mel = self.base.vae, self.base.vocoder, self.base.mel
        model.scale.fill_(self.scale_of(arm, seed))
        model.to(self.device).eval()  # all but the U-Net stays so: dropout would disturb the embeddings
        if model.gaussian is not None:
            fitted = [examples[i] for i in range(min(4000, len(examples)))]
            fit_gaussian(model, *(torch.stack([item[key] for item in fitted]) for key in ("latent", "embeddings")))
        return model, examples

    @property
    def _batch_size(self):
        return self.config.training["ldm"].batch_size

    def trained(self, run: Run) -> RefinedAudioLDM:
        """The model that a finished run left in this folder. Raises FileNotFoundError if it has not been run here."""
        model, _ = self.model(run.arm, run.seed, run.iterations)
        model.load_part("ldm", self.folder / "runs" / run.name)
        return model

    def held_out_latents(self) -> torch.Tensor:
        """Latents (B, C, T, F) of the held-out clips, not yet scaled."""
        if not hasattr(self, "_held_out_latents"):
            self._held_out_latents = torch.cat([self._encode(w) for w in self._batches(self.held_out)])
        return self._held_out_latents

    def card(self, run: Run, model: RefinedAudioLDM) -> Card:
        """The card of a run's numbers."""
        arm = run.arm
        drop = 1 - (1 - arm.drop) * (1 - arm.conditioner_dropout)
        weighting = "eps" if arm.loss_weighting == "eps" else arm.parameterization
        unet, weights = model.config.unet, weights_digest(model.clap)[:8]
        return Card(round(float(model.scale), 6), arm.parameterization, weighting, arm.audio_share, drop,
                    unet.embedding_gain, unet.embedding_dim, arm.timesteps, f"val-{len(self.held_out)}",
                    PRECISIONS[pick_accelerator(self.device).mixed_precision], machine_kind(self.device),
                    f"{arm.conditioner}, {weights}", arm.lr_schedule, run.iterations)  # fmt: skip

    @torch.no_grad()
    def noise_error(self, model: RefinedAudioLDM) -> np.ndarray:
        """Mean squared error of the predicted noise on the held-out clips, at every timestep of GRID (len(GRID),)."""
        model.eval()
        z_0 = model.scale * self.held_out_latents()
        c = model.clap.embed_text([item["caption"] for item in self.held_out])
        return noise_errors(model, z_0, c, step_seed(0, 0)).mean(1).cpu().numpy()

    def quality(
        self, model: RefinedAudioLDM, guidance: float | None = None, steps: int = 16
    ) -> tuple[dict[str, float], AdherenceResult]:
        """Sounds made from the test captions against the clips themselves -> ({measure: number}, AdherenceResult).

        The measures: Fréchet and kernel distance in the outside embedding, and class recall. guidance: None takes the
        arm's; steps: of the sampler.
        """
        probed, real = self.probed()
        result = evaluate_generated(probed, model, self.test, guidance, steps, batch_size=16)
        one = np.array([item["kind"] == "event" for item in self.test])
        made, pca = (result.embeddings, real.embeddings), min(64, len(one) - 1)
        measures = {"frechet": frechet_distance(*made, pca), "kernel": kernel_distance(*made, "gaussian")}
        return measures | {"recall": result.recall.mean(), "recall_one": result.recall[one].mean()}, result

    def details(self, model: RefinedAudioLDM, steps: int = 8) -> dict[str, np.ndarray]:
        """Sounds made from captions that name details -> {detail: 1 or 0 for each caption that names it}."""
        scenes = select_scenes(max(2, self.test_size // 3), seconds=self.config.seconds)
        if isinstance(model.clap, Oracle):
            model.clap.learn(scene.item | {"captions": [str(scene.caption)]} for scene in scenes)
        captions, seconds = [scene.caption for scene in scenes], self.config.seconds
        parts = [[str(caption) for caption in captions[k : k + 16]] for k in range(0, len(captions), 16)]
        made = [model.generate(part, seconds, steps=steps, seed=0).cpu() for part in parts]
        return classify_details(DetailClassifier.load().to(self.device), torch.cat(made), captions).correct()


def open_experiment(folder: str | Path, name: str = "tiny", clips: int | None = None, audioldm: str = "",
                    laion: str = "", ms: str = "", tokenizer: str = "",
                    device: torch.device | str = "cpu", **settings: Any) -> Experiment:  # fmt: skip
    """The experiment of a preset.

    tiny: the shipped VAE and vocoder, conditioners trained here, a small U-Net. colab, paper: those of a published
    AudioLDM (`audioldm`, a file or a folder), with the published conditioners (`laion`, with the folder of its
    `tokenizer`, and `ms`). Raises ValueError naming what is missing.
    """
    config = preset(name) if clips is None else preset(name, clips=clips)
    if name == "tiny":
        wide = replace(config.unet, caption_map=0)  # the U-Net of all stored runs, which had no map of the caption
        small = replace(wide, model_channels=32, norm_groups=8, head_channels=32)
        base = RefinedAudioLDM.from_preset("tiny", device)
        return Experiment(folder, replace(config, unet=small), base, preset_unet=wide, **settings)
    given = {"audioldm": audioldm, "laion": laion, "ms": ms, "tokenizer": tokenizer}
    if missing := [key for key, path in given.items() if not path]:
        raise ValueError(f"preset {name} needs published files: give {', '.join(missing)}")
    base = RefinedAudioLDM.from_audioldm(audioldm, clap_checkpoint=laion, tokenizer=tokenizer, device=device)
    config = replace(config, mel=base.config.mel, vae=base.config.vae, hifigan=base.config.hifigan)
    return Experiment(folder, config, base, {"laion": laion, "ms": ms}, tokenizer, **settings)
