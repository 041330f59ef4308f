"""The whole model: caption -> CLAP embedding -> latent diffusion -> VAE decoder -> HiFi-GAN -> waveform."""

import hashlib
import math
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from refined_ldm.audio import is_silent_waveform
from refined_ldm.clap import CLAP_PRESETS, SHIPPED, Clap
from refined_ldm.conditioning import guided_noise
from refined_ldm.config import Config, load_config, preset
from refined_ldm.diffusion import NoiseSchedule, ddim_sample, dpmpp_sample, loss_weight, noise_like, to_noise
from refined_ldm.files import check_folder
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.integers import whole, whole_seed
from refined_ldm.linear_denoiser import ConditionalLinearDenoiser, GaussianDenoiser
from refined_ldm.mel import MelSpectrogram, griffin_lim, is_silent_mel
from refined_ldm.tokenizer import one_line
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE
from refined_ldm.weights import load_into, read_weights, save_weights

WEIGHTS = Path(__file__).parent / "weights"  # what is shipped: weights/tiny
REDRAWN = 3  # times that a silent sound is drawn again
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json")  # what a folder keeps of a tokenizer's directory


def is_shipped(name):
    """Whether the package brings trained weights of a preset."""
    return (WEIGHTS / name / "config.yaml").is_file()


def part_path(folder, part, config):
    """Where in a folder a part of a model is written and read."""
    return Path(folder) / (f"clap-{config.clap}.safetensors" if part == "clap" else f"{part}.safetensors")


def _load_clap(config, folder):
    """The conditioner in a folder, with the vocabulary beside it; else from the file that is named, or from its hub."""
    path, tokenizer = part_path(folder, "clap", config), Path(folder) / "tokenizer"
    if not path.is_file():
        path = config.clap_checkpoint or (path if config.clap in SHIPPED else None)
    return Clap.load(config.clap, path, tokenizer if tokenizer.is_dir() else config.tokenizer or None)


class RefinedAudioLDM(nn.Module):
    """Captions -> waveforms. Parts: `clap`, `unet`, `vae`, `vocoder`, `mel`, `schedule` and the latent `scale`."""

    film_fit = None  # FilmFit of a conditioner that was swapped in and fitted

    def __init__(self, config: Config, seed=0, clap=None):
        """Fresh random weights drawn from `seed`; `clap`: a conditioner that is there already."""
        super().__init__()
        if config.clap not in CLAP_PRESETS:
            raise ValueError(f"no conditioner {config.clap!r}: choose one of {', '.join(CLAP_PRESETS)}")
        self.config = config
        self.schedule = NoiseSchedule.ldm(config.diffusion_steps, config.beta_start, config.beta_end)
        self.mel = MelSpectrogram(config.mel)
        with torch.random.fork_rng():
            torch.manual_seed(whole_seed(seed))
            self.clap = Clap(CLAP_PRESETS[config.clap]) if clap is None else clap
            self.vae = MelVAE(config.vae)
            self.unet = UNet(config.unet)
            self.vocoder = HiFiGAN(config.hifigan, config.mel)
        if self.clap.embedding_dim != config.unet.embedding_dim:
            raise ValueError(f"{config.clap} embeds in {self.clap.embedding_dim} numbers, the U-Net expects "
                             f"{config.unet.embedding_dim}: change unet.embedding_dim")  # fmt: skip
        self.gaussian = None
        channels, bins = config.vae.latent_channels, config.mel.n_mels // config.vae.downsampling
        if config.parameterization == "gaussian":
            self.gaussian = GaussianDenoiser(channels, bins)
        if config.parameterization == "caption-gaussian":
            frames = config.samples // config.mel.hop_length // config.vae.downsampling
            self.gaussian = ConditionalLinearDenoiser(channels, bins, config.unet.embedding_dim, frames)
        self.register_buffer("scale", torch.tensor(1.0))  # latents times this have unit variance

    @property
    def device(self):
        return self.scale.device

    # --- the pieces of the path ---

    def encode(self, waveform, generator=None):
        """waveform (B, N) -> scaled latent (B, C, T / 4, F / 4): a sample, or the mean without a generator."""
        posterior = self.vae.encode(self.mel(waveform))
        return self.scale * (posterior.mean if generator is None else posterior.sample(generator))

    def decode(self, latent):
        """Scaled latent (B, C, T / 4, F / 4) -> log-mel (B, 1, T, F)."""
        return self.vae.decode(latent / self.scale)

    def to_waveform(self, mel):
        """Log-mel (B, 1, T, F) -> waveform (B, T * hop) in [-1, 1], by HiFi-GAN or by Griffin-Lim.

        What Griffin-Lim makes louder than full scale is turned down as a whole, not clipped.
        """
        if self.config.vocoder == "griffin_lim":
            waveform = griffin_lim(mel, self.config.mel)
            return waveform / waveform.abs().amax(1, keepdim=True).clamp(min=1)
        return self.vocoder(mel)

    def denoise(self, z_t, t, embedding, unet=None):
        """The noise in z_t (B, C, T, F) at timestep t (B,), told by an embedding (B, D).

        Whatever the U-Net predicts (`config.parameterization`), what comes out is eps. `unet` stands in for the
        model's own while it is trained inside a wrapper.
        """
        prediction = (unet or self.unet)(z_t, t, embedding).float()
        if self.gaussian is None:
            return to_noise(prediction, z_t, t, self.schedule, self.config.parameterization)
        alpha_bar = self.schedule.at(t)
        spread = self.gaussian.residual(alpha_bar).sqrt()[:, None, None, None]
        return self.gaussian.noise(z_t, alpha_bar, embedding) + spread * prediction

    def loss_weight(self, t):
        """The factor (B,) that turns a squared error in eps into one in what the U-Net predicts."""
        if self.gaussian is None:
            return loss_weight(t, self.schedule, self.config.parameterization)
        return 1 / self.gaussian.residual(self.schedule.at(t))

    # --- caption in, sound out ---

    @torch.no_grad()
    def generate(
        self, captions, seconds=None, steps=None, guidance_scale=None, seed=0, negative_caption="", sampler="dpmpp",
        eta=1.0, candidates=None, on_step=None, guidance_interval=None, on_note=None,
    ):  # fmt: skip
        """Captions (a list of B strings) -> waveforms (B, N) in [-1, 1], N = seconds * 16000.

        None takes the preset's value. The noise of a caption depends on `seed` and on the caption alone, so its sound
        does not change with the others in the list. Line breaks and control characters in a caption count as spaces.
        negative_caption: what guidance moves away from. sampler: "dpmpp",
        or "ddim" with its eta. guidance_interval: the first and the last timestep that are guided; the others take half
        the time. candidates: how many to draw per caption, of which the CLAP embedding keeps the nearest.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions must be a list of strings, got one string: write [{captions!r}]")
        captions = list(captions)
        if not captions:
            raise ValueError("captions is empty: give at least one")
        if sampler not in ("dpmpp", "ddim"):
            raise ValueError(f"sampler must be dpmpp or ddim, got {sampler!r}")
        seconds = self.config.seconds if seconds is None else seconds
        candidates = self.config.candidates if candidates is None else candidates
        if not 0.01 <= seconds <= 120:
            raise ValueError(f"seconds must be between 0.01 and 120, got {seconds}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {eta}")
        candidates, seed = whole("candidates", candidates, 1), whole_seed(seed)
        captions, negative_caption = [one_line(caption) for caption in captions], one_line(negative_caption)
        note = on_note or (lambda message: warnings.warn(message, stacklevel=4))
        for message in self.unfamiliar(captions):
            note(message)
        repeated = [caption for caption in captions for _ in range(candidates)]
        embedding, unconditional = self.clap.embed_text(repeated), self.clap.embed_text([negative_caption])[0]

        def draw(rows, seed):
            some, generators = [repeated[row] for row in rows], self._generators([repeated[row] for row in rows], seed)
            noise = noise_like(embedding.new_empty(len(some), *self._latent_shape(seconds)), generators)
            latent = self.sample_latent(embedding[rows], noise, steps, guidance_scale, unconditional, sampler, eta,
                                        generators, on_step, guidance_interval)  # fmt: skip
            check_sound("latent", latent, some)
            mel = self.decode(latent)
            check_sound("mel", mel, some)
            waveform = self.to_waveform(mel)[:, : round(seconds * self.config.mel.sample_rate)]
            check_sound("waveform", waveform, some)
            silent = (is_constant(latent), is_silent_mel(mel, self.config.mel.floor), is_silent_waveform(waveform))
            return waveform, torch.stack(silent)  # (B, N), (3, B)

        waveform, silent = draw(list(range(len(repeated))), seed)
        for again in range(1, REDRAWN + 1):
            if not (rows := silent.any(0).nonzero()[:, 0].tolist()):
                break
            for row in rows:
                note(f"the sound of {repeated[row]!r:.60} was silent and is drawn again ({again} of {REDRAWN} times)")
            waveform[rows], silent[:, rows] = draw(rows, f"{seed}, again {again}")
        for stage, of_stage in zip(("latent", "mel", "waveform"), silent, strict=True):
            check_sound(stage, waveform, repeated, of_stage)
        if candidates == 1:
            return waveform
        nearness = (self.clap.embed_audio(waveform, self.config.mel.sample_rate) * embedding).sum(1)
        best = nearness.view(len(captions), candidates).argmax(1)
        return waveform.view(len(captions), candidates, -1)[torch.arange(len(captions)), best]

    def unfamiliar(self, captions):
        """One message for each caption with words that no training caption held, with the nearest that it knows.

        Nothing is said of a conditioner whose vocabulary was trained whole, as the published ones' was, or that is no
        `Clap` (the oracle of the experiment).
        """
        if self.config.data != "scenes" or not isinstance(self.clap, Clap):
            return []
        from refined_ldm.scenes.familiar import nearest_captions, unseen_words

        return [f"{caption!r:.80} holds what the model was never trained on ({', '.join(words)}); the nearest captions "
                f"that it knows: {'; '.join(nearest_captions(self.clap, caption))}"
                for caption in captions if (words := unseen_words(self.clap, caption))]  # fmt: skip

    @torch.no_grad()
    def sample_latent(
        self, embedding, z_T, steps=None, guidance_scale=None, unconditional=None, sampler="dpmpp", eta=1.0,
        generator=None, on_step=None, guidance_interval=None,
    ):  # fmt: skip
        """Embeddings (B, D) and noise z_T (B, C, T, F) -> scaled latents, by guided diffusion.

        unconditional: the embedding (D,) that guidance moves away from, that of "" if None; generator: of DDIM's noise;
        guidance_interval: first and last timestep that are guided.
        """
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance}")
        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        interval = tuple(whole("guidance_interval", t, 0) for t in interval)
        if unconditional is None:
            unconditional = self.clap.embed_text([""])[0]

        def guided(z_t, t, c):
            return guided_noise(self.denoise, z_t, t, c, unconditional, guidance, interval)

        if sampler == "ddim":
            return ddim_sample(guided, z_T, embedding, self.schedule, steps, eta, generator, on_step=on_step)
        return dpmpp_sample(guided, z_T, embedding, self.schedule, steps, on_step=on_step)

    def _latent_shape(self, seconds):
        """(C, T, F) of a latent that holds `seconds`."""
        config = self.config
        hops = config.vae.downsampling * config.unet.downsampling  # frames per coarsest frame of the U-Net
        frames = -(-round(seconds * config.mel.sample_rate) // (config.mel.hop_length * hops)) * hops
        return (config.vae.latent_channels, frames // config.vae.downsampling,
                config.mel.n_mels // config.vae.downsampling)  # fmt: skip

    @staticmethod
    def _generators(captions, seed):
        """One source of noise for each caption, from (seed, caption, how often that caption came before)."""
        generators, seen = [], {}
        for caption in captions:
            copy = seen[caption] = seen.get(caption, -1) + 1
            digest = hashlib.sha256(f"{seed}/{copy}/{caption}".encode()).digest()
            generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
        return generators

    # --- files ---

    def save(self, folder, dtype=torch.float32):
        """Write config.yaml and one safetensors file for each part into `folder`."""
        folder = Path(folder)
        parts = [part_path(folder, part, self.config).name for part in ("vae", "ldm", "hifigan", "clap")]
        check_folder(folder, [*parts, "config.yaml"])
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("vae", "ldm", "hifigan", "clap"):
            self.save_part(part, folder, dtype)
        self.config.save(folder / "config.yaml")

    def save_part(self, part, folder, dtype=torch.float32):
        """Write one part: vae, ldm (U-Net, latent scale and linear denoiser), hifigan or clap."""
        path = part_path(folder, part, self.config)
        if part == "clap":
            self.clap.save(path, dtype)
            self._save_vocabulary(path.parent / "tokenizer")
        elif part == "ldm":
            save_weights(path, self._ldm_state(), self.config.unet, dtype)
        else:
            save_weights(path, self._part(part), self._part(part).config, dtype)

    def load_part(self, part, folder):
        """Read one part written by `save_part`; raises FileNotFoundError or ValueError (what does not fit).

        A conditioner that is not in `folder` comes from the file that the configuration names, or from its hub.
        """
        path = part_path(folder, part, self.config)
        if part == "clap":
            self.clap = _load_clap(self.config, folder).to(self.device)
            return
        state, _ = read_weights(path)
        if part != "ldm":
            load_into(self._part(part), state, path)
            return
        wanted, held = ({name.split(".")[0] for name in names} for names in (self._ldm_state(), state))
        if wanted != held:
            raise ValueError(f"{path} does not fit the parameterization {self.config.parameterization!r}: it holds "
                             f"{', '.join(sorted(held))} where {', '.join(sorted(wanted))} were expected")  # fmt: skip
        if state["scale"].numel() != 1:
            raise ValueError(f"{path}: scale is of shape {tuple(state['scale'].shape)}: one number was expected")
        load_into(self.unet, {k[5:]: v for k, v in state.items() if k.startswith("unet.")}, path)
        if self.gaussian is not None:
            load_into(self.gaussian, {k[9:]: v for k, v in state.items() if k.startswith("gaussian.")}, path)
        self.scale.copy_(state["scale"].reshape(()))

    def _save_vocabulary(self, folder):
        """Copy the vocabulary that the conditioner was given; those of the installed packages stay where they are."""
        if self.clap.vocabulary is None or Path(self.clap.vocabulary).resolve() == folder.resolve():
            return
        for given in (Path(self.clap.vocabulary) / name for name in VOCABULARY):
            if given.is_file():
                folder.mkdir(exist_ok=True)
                shutil.copyfile(given, folder / given.name)

    def _part(self, part):
        return {"vae": self.vae, "hifigan": self.vocoder, "clap": self.clap}[part]

    def _ldm_state(self):
        state = {f"unet.{k}": v for k, v in self.unet.state_dict().items()} | {"scale": self.scale}
        if self.gaussian is not None:
            state |= {f"gaussian.{k}": v for k, v in self.gaussian.state_dict().items()}
        return state

    @classmethod
    def load(cls, folder, device="cpu", **changes):
        """Read a folder written by `save`; `changes` as in `preset`. Raises FileNotFoundError or ValueError."""
        folder = Path(folder)
        if folder.is_file() or (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no folder written by RefinedAudioLDM.save: convert it first (`refined-ldm "
                             f"convert {folder} FOLDER`) and give that folder")  # fmt: skip
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"no config.yaml in {folder}: give a folder written by RefinedAudioLDM.save")
        config = load_config(folder / "config.yaml").changed(**changes)
        model = cls(config, clap=_load_clap(config, folder))
        for part in ("vae", "ldm"):
            model.load_part(part, folder)
        if model.config.vocoder == "hifigan" or part_path(folder, "hifigan", model.config).is_file():
            model.load_part("hifigan", folder)  # a run has none until it is trained
        return model.to(device).eval()

    @classmethod
    def from_audioldm(
        cls, path, conditioner=None, clap_checkpoint=None, tokenizer=None, fit_on=None, average=True, device="cpu",
        **changes,
    ):  # fmt: skip
        """An AudioLDM as published: its .ckpt or .safetensors (S, M, L), or a diffusers `AudioLDMPipeline` directory.

        conditioner: None takes the one in the file; another name in CLAP_PRESETS, with `clap_checkpoint` as its file,
        swaps it, and of the U-Net only the layer fed by the caption is new: random, or fitted so that the captions
        `fit_on` keep the film vectors they had (`film_fit` tells how well). tokenizer: the directory of roberta-base's
        vocabulary; a pipeline brings its own. average: the U-Net's running average. changes: as in `preset`.
        Raises FileNotFoundError, or ValueError saying what does not fit.
        """
        from refined_ldm.published.audioldm import model_from_audioldm

        return model_from_audioldm(
            cls, path, conditioner, clap_checkpoint, tokenizer, fit_on, average, device, **changes
        )

    @classmethod
    def from_preset(cls, name="tiny", device="cpu", **changes):
        """A preset's model: `tiny` with the shipped weights, any other with fresh ones. `changes` as in `preset`."""
        if is_shipped(name):
            return cls.load(WEIGHTS / name, device, **changes)
        return cls(preset(name, **changes)).to(device).eval()


def check_sound(stage, batch, captions, silent=None):
    """Refuse latents, mels or waveforms (B, …) that hold NaN or infinity; warn of captions that are `silent` (B,).

    Raises FloatingPointError naming stage, captions and type of number.
    """
    bad = [c for c, item in zip(captions, batch, strict=True) if not item.isfinite().all()]
    if bad:
        raise FloatingPointError(f"the {stage} of {_named(bad)} holds NaN or infinite numbers ({batch.dtype}): "
                                 "try float32, or other weights")  # fmt: skip
    if silent is not None and silent.any():
        quiet = [c for c, is_silent in zip(captions, silent.tolist(), strict=True) if is_silent]
        warnings.warn(f"the {stage} of {_named(quiet)} is silent: try another seed, or other weights", stacklevel=3)


def _named(captions):
    shown = ", ".join(repr(c[:60]) for c in captions[:3])
    return f"{shown} and {len(captions) - 3} more" if len(captions) > 3 else shown


def is_constant(latent):
    """Which of the latents (B, C, T, F) hold one number throughout, as after an underflow -> (B,)."""
    flat = latent.flatten(1)
    return torch.eq(flat, flat[:, :1]).all(1)
