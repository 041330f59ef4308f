"""The whole model: caption -> CLAP embedding -> latent diffusion -> VAE decoder -> HiFi-GAN -> waveform.

Notebook: 05
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from refined_ldm import diffusion, editing, long_sounds, model_folder, variations
from refined_ldm.adapters import lora, refiner, student
from refined_ldm.adapters.candidates import Drawing, has_matcher
from refined_ldm.base.integers import number, whole, whole_seed
from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.conditioning import guided_noise
from refined_ldm.config import Config, preset
from refined_ldm.devices import fitting_threads
from refined_ldm.diffusion import NoiseSchedule, ddim_sample, dpmpp_sample, jump_sample, to_noise
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.linear_denoiser import ConditionalLinearDenoiser, GaussianDenoiser
from refined_ldm.mel import MelSpectrogram, griffin_lim
from refined_ldm.randomness import caption_generators
from refined_ldm.tokenizer import one_line
from refined_ldm.unet import DeepFeatures, UNet
from refined_ldm.vae import MelVAE


class RefinedAudioLDM(nn.Module):
    """Text to audio. Parts: `clap`, `unet`, `vae`, `vocoder`, `mel`, `schedule`, the `latent_scale` and, if the
    model has them, `student`, `matcher` and `refiner`.

    Some methods are functions of other modules: `load`, `save` (model_folder); `edit`, `inpaint`, `extend`, `loop`,
    `super_resolve` (editing); `generate_long` (long_sounds); `variations`, `interpolate` (variations); `load_lora`,
    `merge_loras`, `remove_loras` (adapters.lora); `load_student` (adapters.student).

    Notebook: 05
    """

    film_fit = None  # FilmFit of a conditioner that was swapped in and fitted
    cache_interval = 1  # sampling steps for each complete evaluation of the U-Net; more: DeepCache
    loras = None  # Loras beside the U-Net's layers
    student_file = None  # Path of the file that the student was loaded from

    def __init__(self, config: Config, seed: int = 0, clap: Clap | None = None):
        """Build a model with random weights drawn from `seed`, and with `clap` as its conditioner if it is given.

        Raises ValueError for an unknown conditioner, or one whose embeddings the U-Net does not fit.
        """
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
            raise ValueError(
                f"{config.clap} embeds in {self.clap.embedding_dim} numbers, the U-Net expects "
                f"{config.unet.embedding_dim}: change unet.embedding_dim"
            )
        self.gaussian, self.student = None, None  # student: a U-Net of `load_student`
        self.matcher = None  # Matcher, of a model folder that has one
        self.refiner = None  # Refiner, likewise
        channels, bins = config.vae.latent_channels, config.mel.n_mels // config.vae.downsampling
        if config.parameterization == "gaussian":
            self.gaussian = GaussianDenoiser(channels, bins)
        if config.parameterization == "caption-gaussian":
            frames = config.samples // config.mel.hop_length // config.vae.downsampling
            self.gaussian = ConditionalLinearDenoiser(channels, bins, config.unet.embedding_dim, frames)
        self.register_buffer("scale", torch.tensor(1.0))  # `latent_scale`, under its stored name

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def latent_scale(self) -> torch.Tensor:
        """The factor (scalar) that gives latents unit variance."""
        return self.scale

    # --- the steps of generation ---

    def encode(self, waveform: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode a waveform (B, N) -> scaled latent (B, C, T / 4, F / 4): a sample, or the mean without a generator."""
        posterior = self.vae.encode(self.mel(waveform))
        return self.latent_scale * (posterior.mean if generator is None else posterior.sample(generator))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode a scaled latent (B, C, T / 4, F / 4) -> log-mel (B, 1, T, F)."""
        with self._threads(latent.numel() // latent.shape[1]):
            return self.vae.decode(latent / self.latent_scale)

    def to_waveform(self, mel: torch.Tensor) -> torch.Tensor:
        """Convert a log-mel (B, 1, T, F) -> waveform (B, T * hop) in [-1, 1], by HiFi-GAN or Griffin-Lim.

        A waveform from Griffin-Lim above full scale is scaled down as a whole, not clipped.
        """
        with self._threads(mel.numel() // self.config.vae.downsampling**2):
            if self.config.vocoder == "griffin_lim":
                waveform = griffin_lim(mel, self.config.mel)
                return waveform / waveform.abs().amax(1, keepdim=True).clamp(min=1)
            return self.vocoder(mel)

    def _threads(self, positions):
        """Choose the threads of the CPU for latents (B, C, T, F) of B * T * F `positions`, within a context."""
        return fitting_threads(self.unet, positions, self.device)

    def denoise(
        self,
        z_t: torch.Tensor,
        t: torch.Tensor,
        embedding: torch.Tensor,
        unet: nn.Module | None = None,
        end: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the noise in z_t (B, C, T, F) at timestep t (B,), given an embedding (B, D) -> eps (B, C, T, F).

        The result is eps for every `config.parameterization`. `unet` replaces the model's own while it is trained
        inside a wrapper. end (B,): the timesteps, or CLEAN, to which the eps of a student is to jump.

        Notebook: 03
        """
        prediction = (unet or self.unet)(z_t, t, embedding, *(() if end is None else (end,))).float()
        if self.gaussian is None:
            return to_noise(prediction, z_t, t, self.schedule, self.config.parameterization)
        alpha_bar = self.schedule.at(t)
        spread = self.gaussian.residual(alpha_bar).sqrt()[:, None, None, None]
        return self.gaussian.noise(z_t, alpha_bar, embedding) + spread * prediction

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Return the factor (B,) that turns a squared error of eps into one of the U-Net's own target."""
        if self.gaussian is None:
            return diffusion.loss_weight(t, self.schedule, self.config.parameterization)
        return 1 / self.gaussian.residual(self.schedule.at(t))

    # --- generation ---

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        negative_caption: str = "",
        sampler: str | None = None,
        eta: float = 1.0,
        candidates: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> torch.Tensor:
        """Generate a sound for each of B captions -> waveforms (B, N) in [-1, 1], N = seconds * 16000.

        None takes the configuration's value. The noise of a caption depends on `seed` and the caption alone, on every
        device, so its sound does not depend on the others, up to rounding (mostly below 1e-3 in float32; 1e-2 of its
        size in half precision or TF32). Line breaks and control characters in a caption count as spaces.

        negative_caption: the caption that guidance moves away from. sampler: "dpmpp", "ddim" with its `eta`, or
        "student", which takes 4, 2 or 1 `steps` of one evaluation each, by default 4, with the guidance that it was
        taught; negative captions and other guidance are its teacher's, "dpmpp". Where the configuration's is the
        student, "dpmpp" takes its place for what it was not taught.
        guidance_interval: the first and the last timestep with guidance; the others take half the time.
        candidates: sounds per caption, of which the one that fits best by the matcher is kept; without a matcher, or at
        another length than it learned, the one with the nearest CLAP embedding. None: the configuration's, but two at
        most at that length, and where another sampler takes the place of the configuration's.
        With a refiner a student's candidates are drafts: its teacher mends the best few before one is kept
        (`adapters.refiner`).
        A CPU computes a few clips of a small model with one thread, which is the fastest (`devices.fitting_threads`).
        on_step: called with (steps done, steps in all); on_note: called with each message, else they are warnings.
        Raises ValueError for an impossible argument, FloatingPointError for a non-finite result.

        Notebook: 05
        """
        if isinstance(captions, str):
            raise ValueError(f"captions must be a list of strings, got one string: write [{captions!r}]")
        captions = list(captions)
        if not captions:
            raise ValueError("captions is empty: give at least one")
        taught = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
        sampler = student.pick_sampler(self, sampler, steps, {**taught, "negative_caption": negative_caption or None})
        seconds = self.config.seconds if seconds is None else seconds
        seconds, eta = number("seconds", seconds, 0.01, 120), number("eta", eta, 0, 1)
        if candidates is None:  # many are drawn where they cost little: by a student, and not decoded to be compared
            cheap = sampler == self.config.sampler and (self.matcher is None or has_matcher(self, seconds))
            candidates = self.config.candidates if cheap else min(2, self.config.candidates)
        candidates, seed = whole("candidates", candidates, 1), whole_seed(seed)
        captions, negative_caption = [one_line(caption) for caption in captions], one_line(negative_caption)
        note = on_note or (lambda message: warnings.warn(message, stacklevel=4))
        for message in self.unfamiliar(captions):
            note(message)
        unconditional = self.clap.embed_text([negative_caption])[0]
        settings = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "eta": eta,
            "on_step": on_step,
        }
        sample = partial(self.sample_latent, unconditional=unconditional, **settings)
        drawing = Drawing(self, captions, candidates, seconds, seed, unconditional, sample)
        drafts = sampler == "student" and steps in (None, max(student.STEPS))
        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        return drawing.best(interval, drafts, note)

    def unfamiliar(self, captions: Sequence[str]) -> list[str]:
        """Return a message for each caption with words from no training caption; it names the nearest known captions.

        Published conditioners, whose vocabulary is fully trained, and stand-ins that are no `Clap` give no messages.
        """
        if self.config.data != "scenes" or not isinstance(self.clap, Clap):
            return []
        from refined_ldm.scenes.familiar import unfamiliar

        return unfamiliar(self.clap, captions)

    @torch.no_grad()
    def sample_latent(
        self,
        embedding: torch.Tensor,
        z_T: torch.Tensor,
        steps: int | None = None,
        guidance_scale: float | None = None,
        unconditional: torch.Tensor | None = None,
        sampler: str = "dpmpp",
        eta: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        guidance_interval: tuple[int, int] | None = None,
        lowest: int = 0,
    ) -> torch.Tensor:
        """Sample scaled latents (B, C, T, F) by guided diffusion from embeddings (B, D) and noise z_T (B, C, T, F).

        unconditional: the embedding (D,) that guidance moves away from, that of "" if None. generator: of DDIM's noise.
        guidance_interval: the first and the last timestep with guidance. A "student" has no use for the three; it alone
        leaves out jumps from timesteps below `lowest`. Raises ValueError for an impossible argument.

        Notebook: 05
        """
        if sampler == "student":
            steps = student.check(self, steps)
            return jump_sample(self.student_noise, z_T, embedding, self.schedule, steps, on_step, lowest)
        steps, spacing = self.config.steps if steps is None else steps, "leading" if sampler == "ddim" else "trailing"
        timesteps = iter(self.schedule.timesteps(steps, spacing))
        deep = DeepFeatures(self.cache_interval) if self.cache_interval > 1 else None
        guided = self.guided(unconditional, guidance_scale, guidance_interval, timesteps, deep)
        if sampler == "ddim":
            return ddim_sample(guided, z_T, embedding, self.schedule, steps, eta, generator, spacing, on_step=on_step)
        return dpmpp_sample(guided, z_T, embedding, self.schedule, steps, spacing, on_step=on_step)

    def guided(
        self,
        unconditional: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        timesteps: Iterator[int] | None = None,
        deep: DeepFeatures | None = None,
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return `denoise` with guidance away from `unconditional` (D,): a function of z_t, t and embeddings (B, D).

        None takes the embedding of "" and the configuration's values. timesteps: those of the calls to come; without
        them the CPU waits for the device at each call to read `t`, unless there is guidance at every timestep. deep:
        features that the calls reuse, one sampling's. Raises ValueError for an impossible argument.
        """
        guidance = number("guidance_scale", self.config.guidance_scale if guidance_scale is None else guidance_scale)
        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be two timesteps, the lower first, got {interval!r}")
        interval = tuple(whole("guidance_interval", t, 0) for t in interval)
        if interval[0] > interval[1]:
            raise ValueError(f"guidance_interval must be two timesteps, the lower first, got {interval}")
        if unconditional is None:
            unconditional = self.clap.embed_text([""])[0]
        within = None
        if timesteps is None:
            everywhere = interval[0] == 0 and interval[1] >= self.schedule.steps - 1
            within = None if everywhere else interval
        denoise = self.denoise if deep is None else partial(self.denoise, unet=partial(self.unet, deep=deep))

        def guided(z_t: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            scale = guidance
            if timesteps is not None:
                scale = guidance if interval[0] <= next(timesteps) <= interval[1] else 1.0
            with self._threads(z_t.numel() // z_t.shape[1]):
                return guided_noise(denoise, z_t, t, c, unconditional, scale, within)

        return guided

    def latent_shape(self, seconds: float) -> tuple[int, int, int]:
        """Return the shape (C, T, F) of a latent of `seconds` s."""
        config, down = self.config, self.config.vae.downsampling
        hops = down * config.unet.downsampling  # frames per coarsest frame of the U-Net
        frames = -(-round(seconds * config.mel.sample_rate) // (config.mel.hop_length * hops)) * hops
        return config.vae.latent_channels, frames // down, config.mel.n_mels // down

    _latent_shape, _generators = latent_shape, staticmethod(caption_generators)  # earlier names, for callers outside

    # --- methods of other files, each with its concept ---

    load, save, digest = classmethod(model_folder.load), model_folder.save, model_folder.digest
    load_part, save_part = model_folder.load_part, model_folder.save_part
    edit, inpaint, extend, super_resolve = editing.edit, editing.inpaint, editing.extend, editing.super_resolve
    loop, generate_long = editing.loop, long_sounds.generate_long
    variations, interpolate = variations.variations, variations.interpolate
    load_lora, merge_loras = lora.load_lora, lora.merge_loras
    remove_loras, with_loras = lora.remove_loras, lora.with_loras
    load_student, student_noise = student.load_student, student.student_noise
    refine, restart = refiner.refine, refiner.restart

    @classmethod
    def from_audioldm(
        cls,
        path: str | Path,
        conditioner: str | None = None,
        clap_checkpoint: str | Path | None = None,
        tokenizer: str | Path | None = None,
        fit_on: Sequence[str] | None = None,
        average: bool = True,
        device: torch.device | str = "cpu",
        **changes,
    ) -> "RefinedAudioLDM":
        """Load a published AudioLDM: its .ckpt or .safetensors (S, M, L), or a diffusers `AudioLDMPipeline` directory.

        conditioner: None takes the one in the file; another name in CLAP_PRESETS, with `clap_checkpoint` as its file,
        replaces it. Of the U-Net only the layer fed by the caption is then new: random, or fitted so that the captions
        `fit_on` keep their FiLM vectors (`film_fit` holds the error). tokenizer: the directory of roberta-base's
        vocabulary; a pipeline brings its own. average: load the U-Net's running average. changes: as in `preset`.
        Raises FileNotFoundError, or ValueError naming what does not fit.

        Notebook: 02
        """
        from refined_ldm.published.audioldm import model_from_audioldm

        return model_from_audioldm(
            cls, path, conditioner, clap_checkpoint, tokenizer, fit_on, average, device, **changes
        )

    @classmethod
    def from_preset(cls, name: str = "tiny", device: torch.device | str = "cpu", **changes) -> "RefinedAudioLDM":
        """Return a preset's model: `tiny` with the shipped weights, any other with random ones.

        changes: as in `preset`. Raises ValueError for an unknown preset or field.

        Notebook: 05
        """
        if folder := model_folder.shipped_folder(name):
            return cls.load(folder, device, **changes)
        return cls(preset(name, **changes)).to(device, non_blocking=True).eval()
