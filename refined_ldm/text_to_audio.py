"""The whole model: caption -> CLAP embedding -> latent diffusion -> VAE decoder -> HiFi-GAN -> waveform.

Notebook: 05
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from refined_ldm import editing, long_sounds, variations
from refined_ldm.audio import are_finite, check_finite, is_silent_waveform, warn_of_silence
from refined_ldm.clap import CLAP_PRESETS, SHIPPED, Clap
from refined_ldm.conditioning import guided_noise
from refined_ldm.config import SAMPLERS, Config, load_config, preset
from refined_ldm.devices import fitting_threads
from refined_ldm.diffusion import (
    Denoiser,
    NoiseSchedule,
    ddim_sample,
    dpmpp_sample,
    jump_sample,
    loss_weight,
    noise_like,
    to_noise,
)
from refined_ldm.files import atomic_write, check_folder
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.integers import whole, whole_seed
from refined_ldm.linear_denoiser import ConditionalLinearDenoiser, GaussianDenoiser
from refined_ldm.lora import Loras
from refined_ldm.mel import MelSpectrogram, griffin_lim, is_silent_mel
from refined_ldm.randomness import caption_generators
from refined_ldm.student import STEPS, STUDENT_FILE, load_student, save_again
from refined_ldm.tokenizer import one_line
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE
from refined_ldm.weights import load_into, read_weights, rounded, save_weights, weights_digest

WEIGHTS = Path(__file__).parent / "weights"  # shipped with the package: weights/tiny
REDRAWN = 3  # times that a silent sound is sampled again
REDRAWN_BELOW = 0.6  # of the timesteps: a sound is drawn again with guidance below this one only
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json")  # files copied from a tokenizer's directory


def is_shipped(name: str) -> bool:
    """Return whether the package contains trained weights of a preset."""
    return (WEIGHTS / name / "config.yaml").is_file()


def part_path(folder: str | Path, part: str, config: Config) -> Path:
    """Return the path of a part of a model in a folder."""
    return Path(folder) / (f"clap-{config.clap}.safetensors" if part == "clap" else f"{part}.safetensors")


def _load_clap(config, folder):
    """Load the conditioner in a folder, with the vocabulary beside it; else from the configured file or its hub."""
    path, tokenizer = part_path(folder, "clap", config), Path(folder) / "tokenizer"
    if not path.is_file():
        path = config.clap_checkpoint or (path if config.clap in SHIPPED else None)
    return Clap.load(config.clap, path, tokenizer if tokenizer.is_dir() else config.tokenizer or None)


class RefinedAudioLDM(nn.Module):
    """Text to audio. Parts: `clap`, `unet`, `vae`, `vocoder`, `mel`, `schedule` and the `latent_scale`.

    Notebook: 05
    """

    film_fit = None  # FilmFit of a conditioner that was swapped in and fitted
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
            return loss_weight(t, self.schedule, self.config.parameterization)
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
        device, so its sound does not depend on the others, up to rounding (1e-4 in float32; 1e-2 of its size in half
        precision or TF32). Line breaks and control characters in a caption count as spaces.

        negative_caption: the caption that guidance moves away from. sampler: "dpmpp", "ddim" with its `eta`, or
        "student", which takes 4, 2 or 1 `steps` of one evaluation each, by default 4, with the guidance that it was
        taught; negative captions and other guidance are its teacher's, "dpmpp". Where the configuration's is the
        student, "dpmpp" takes its place for what it was not taught.
        guidance_interval: the first and the last timestep with guidance; the others take half the time.
        candidates: sounds per caption, of which the one with the nearest CLAP embedding is kept. A CPU computes a few
        clips of a small model with one thread, which is the fastest (`devices.fitting_threads`).
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
        sampler = self._pick_sampler(sampler, steps, {**taught, "negative_caption": negative_caption or None})
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

        def draw(rows, seed, interval):
            some = [repeated[row] for row in rows]
            generators = caption_generators(some, seed)
            noise = noise_like(embedding.new_empty(len(some), *self.latent_shape(seconds)), generators)
            own = embedding if len(rows) == len(repeated) else embedding[rows]
            latent = self.sample_latent(
                own, noise, steps, guidance_scale, unconditional, sampler, eta, generators, on_step, interval
            )
            mel = self.decode(latent)
            waveform = self.to_waveform(mel)[:, : round(seconds * self.config.mel.sample_rate)]
            stages = {"latent": latent, "mel": mel, "waveform": waveform}
            silent = [is_constant(latent), is_silent_mel(mel, self.config.mel.floor), is_silent_waveform(waveform)]
            checks = torch.stack([*map(are_finite, stages.values()), *silent]).cpu()  # (6, B): the device is asked once
            for (stage, batch), finite in zip(stages.items(), checks, strict=False):
                check_finite(stage, finite, some, batch.dtype)
            return waveform, checks[3:]  # (B, N), (3, B)

        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        waveform, silent = draw(list(range(len(repeated))), seed, interval)
        # Where there is nearly only noise, guidance turns a sound that is mostly silence into silence.
        interval = (interval[0], max(interval[0], min(interval[1], round(REDRAWN_BELOW * self.schedule.steps))))
        for again in range(1, REDRAWN + 1):
            if not (rows := silent.any(0).nonzero()[:, 0].tolist()):
                break
            for row in rows:
                note(f"the sound of {repeated[row]!r:.60} was silent and is drawn again ({again} of {REDRAWN} times)")
            waveform[rows], silent[:, rows] = draw(rows, f"{seed}, again {again}", interval)
        for stage, of_stage in zip(("latent", "mel", "waveform"), silent, strict=True):
            warn_of_silence(stage, of_stage, repeated)
        if candidates == 1:
            return waveform
        return self.nearest(waveform, embedding, candidates)

    # --- sounds from sounds, and long ones (editing.py, long_sounds.py, variations.py) ---

    edit, inpaint, extend, super_resolve = editing.edit, editing.inpaint, editing.extend, editing.super_resolve
    loop, generate_long = editing.loop, long_sounds.generate_long
    variations, interpolate = variations.variations, variations.interpolate

    def nearest(self, waveform: torch.Tensor, embedding: torch.Tensor, candidates: int) -> torch.Tensor:
        """Of every `candidates` waveforms in (B * candidates, N), the one nearest to its embedding -> (B, N)."""
        nearness = (self.clap.embed_audio(waveform, self.config.mel.sample_rate) * embedding).sum(1)
        best = nearness.view(-1, candidates).argmax(1)
        return waveform.view(len(best), candidates, -1)[torch.arange(len(best), device=best.device), best]

    def unfamiliar(self, captions: Sequence[str]) -> list[str]:
        """Return a message for each caption with words from no training caption; it names the nearest known captions.

        Published conditioners, whose vocabulary is fully trained, and stand-ins that are no `Clap` give no messages.
        """
        if self.config.data != "scenes" or not isinstance(self.clap, Clap):
            return []
        from refined_ldm.scenes.familiar import nearest_captions, unseen_tokens, unseen_words

        unseen = unseen_tokens(self.clap)
        return [f"{caption!r:.80} holds what the model was never trained on ({', '.join(words)}); the nearest captions "
                f"that it knows: {'; '.join(nearest_captions(self.clap, caption))}"
                for caption in captions if (words := unseen_words(self.clap, caption, unseen))]  # fmt: skip

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
    ) -> torch.Tensor:
        """Sample scaled latents (B, C, T, F) by guided diffusion from embeddings (B, D) and noise z_T (B, C, T, F).

        unconditional: the embedding (D,) that guidance moves away from, that of "" if None. generator: of DDIM's noise.
        guidance_interval: the first and the last timestep with guidance. A "student" has no use for the three. Raises
        ValueError for an impossible argument.

        Notebook: 05
        """
        if sampler == "student":
            steps = self._check_student(steps)
            return jump_sample(self.student_noise, z_T, embedding, self.schedule, steps, on_step)
        steps, spacing = self.config.steps if steps is None else steps, "leading" if sampler == "ddim" else "trailing"
        timesteps = iter(self.schedule.timesteps(steps, spacing))
        guided = self.guided(unconditional, guidance_scale, guidance_interval, timesteps)
        if sampler == "ddim":
            return ddim_sample(guided, z_T, embedding, self.schedule, steps, eta, generator, spacing, on_step=on_step)
        return dpmpp_sample(guided, z_T, embedding, self.schedule, steps, spacing, on_step=on_step)

    def student_noise(self, z_t: torch.Tensor, t: torch.Tensor, end: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the eps (B, C, T, F) with which the student's jump from timesteps t to `end` (B,) ends.

        Notebook: 09
        """
        with self._threads(z_t.numel() // z_t.shape[1]):
            return self.denoise(z_t, t, c, self.student, end)

    def _pick_sampler(self, sampler, steps, given):
        """Return the sampler that is asked for, or the configuration's, if the student knows what is `given`."""
        if sampler is None and self.config.sampler == "student":
            known = self.student is not None and self.loras is None and steps in (None, *STEPS)
            return "student" if known and all(value is None for value in given.values()) else "dpmpp"
        sampler = self.config.sampler if sampler is None else sampler
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be dpmpp, ddim or student, got {sampler!r}")
        if sampler == "student":
            self._check_student(steps, given)
        return sampler

    def _check_student(self, steps, given=None):
        """Return the number of steps of the student. Raises ValueError without one, or for what only a teacher does."""
        if self.student is None:
            raise ValueError(
                "this model has no student: train one (`refined-ldm train --distill`) and load it with load_student"
            )
        if self.loras is not None:
            raise ValueError('the student was taught without LoRAs: remove_loras() before, or take sampler="dpmpp"')
        for name in (name for name, value in (given or {}).items() if value is not None):
            raise ValueError(f'{name} does not go with the student, whose guidance is fixed: take sampler="dpmpp"')
        steps = max(STEPS) if steps is None else whole("steps", steps)
        if steps not in STEPS:
            raise ValueError(f'steps of a student must be one of {STEPS}, got {steps}: take sampler="dpmpp" for others')
        return steps

    def guided(
        self,
        unconditional: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        timesteps: Iterator[int] | None = None,
    ) -> Denoiser:
        """Return `denoise` with guidance away from `unconditional` (D,): a function of z_t, t and embeddings (B, D).

        None takes the embedding of "" and the configuration's values. timesteps: those of the calls to come; without
        them the CPU waits for the device at each call to read `t`, unless there is guidance at every timestep. Raises
        ValueError for an impossible argument.
        """
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance}")
        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        interval = tuple(whole("guidance_interval", t, 0) for t in interval)
        if len(interval) != 2 or interval[0] > interval[1]:
            raise ValueError(f"guidance_interval must be two timesteps, the lower first, got {interval}")
        if unconditional is None:
            unconditional = self.clap.embed_text([""])[0]
        within = None
        if timesteps is None:
            everywhere = interval[0] == 0 and interval[1] >= self.schedule.steps - 1
            within = None if everywhere else interval

        def guided(z_t: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            scale = guidance
            if timesteps is not None:
                scale = guidance if interval[0] <= next(timesteps) <= interval[1] else 1.0
            with self._threads(z_t.numel() // z_t.shape[1]):
                return guided_noise(self.denoise, z_t, t, c, unconditional, scale, within)

        return guided

    def latent_shape(self, seconds: float) -> tuple[int, int, int]:
        """Return the shape (C, T, F) of a latent of `seconds` s."""
        config = self.config
        hops = config.vae.downsampling * config.unet.downsampling  # frames per coarsest frame of the U-Net
        frames = -(-round(seconds * config.mel.sample_rate) // (config.mel.hop_length * hops)) * hops
        return (
            config.vae.latent_channels,
            frames // config.vae.downsampling,
            config.mel.n_mels // config.vae.downsampling,
        )

    _latent_shape, _generators = latent_shape, staticmethod(caption_generators)  # earlier names, for callers outside

    # --- LoRA ---

    def load_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA to the U-Net, beside those already there; `weight` scales it, 0 changes nothing.

        Raises FileNotFoundError; ValueError for a LoRA of another model, a weight that is not finite, or a U-Net in
        half precision; ModuleNotFoundError without peft.
        """
        self.with_loras().load(path, weight)

    def merge_loras(self) -> None:
        """Add the LoRAs to the weights of the U-Net: equal sounds, faster. Afterwards the model can be saved.

        A student was taught by the weights before, so the model then has none.
        """
        if self.loras is not None:
            self.student = self.student_file = None
        self._end_loras("merge")

    def remove_loras(self) -> None:
        """Remove the LoRAs of the U-Net."""
        self._end_loras("remove")

    def with_loras(self) -> Loras:
        """Return the LoRAs of this model, none at first. Raises ValueError for a U-Net in half precision."""
        if self.loras is None:
            if any(p.dtype != torch.float32 for p in self.unet.parameters()):
                raise ValueError("the U-Net is not in float32: load LoRAs before optimize_for_inference")
            self.loras = Loras(self.unet, self.digest())
        return self.loras

    def digest(self) -> str:
        """Return the digest of the weights that LoRAs and students belong to: U-Net, latent scale, linear denoiser."""
        return weights_digest(self._ldm_state())

    def load_student(self, path: str | Path) -> None:
        """Take the student in a file of `refined-ldm train --distill`, for `generate(..., sampler="student")`.

        Raises FileNotFoundError; ValueError for another file, a student of another model, or a U-Net in half precision.
        """
        if any(p.dtype != torch.float32 for p in self.unet.parameters()):
            raise ValueError("the U-Net is not in float32: load the student before optimize_for_inference")
        self.student, self.student_file = load_student(path, self.unet, self.digest), Path(path)

    def _end_loras(self, how):
        if self.loras is not None:
            getattr(self.loras, how)()
            self.loras = None

    # --- files ---

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.yaml and one safetensors file for each part, and for the student, into `folder`."""
        folder = Path(folder)
        parts = [part_path(folder, part, self.config).name for part in ("vae", "ldm", "hifigan", "clap")]
        check_folder(folder, [*parts, "config.yaml", STUDENT_FILE])
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("vae", "ldm", "hifigan", "clap"):
            self.save_part(part, folder, dtype)
        if self.student_file:
            save_again(self.student_file, folder / STUDENT_FILE, weights_digest(rounded(self._ldm_state(), dtype)))
        self.config.save(folder / "config.yaml")

    def save_part(self, part: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write one part: vae, ldm (U-Net, latent scale and linear denoiser), hifigan or clap."""
        path = part_path(folder, part, self.config)
        if part == "clap":
            self.clap.save(path, dtype)
            self._save_vocabulary(path.parent / "tokenizer")
        elif part == "ldm":
            save_weights(path, self._ldm_state(), self.config.unet, dtype)
        else:
            save_weights(path, self._part(part), self._part(part).config, dtype)

    def load_part(self, part: str, folder: str | Path, optional: tuple[str, ...] = ()) -> None:
        """Load one part written by `save_part`.

        A conditioner that is not in `folder` comes from the file that the configuration names, or from its hub.
        optional: modules of the U-Net that stay as they are if the file has none of their tensors.
        Raises FileNotFoundError, or ValueError naming the tensors that do not fit.
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
            raise ValueError(
                f"{path} does not fit the parameterization {self.config.parameterization!r}: it holds "
                f"{', '.join(sorted(held))} where {', '.join(sorted(wanted))} were expected"
            )
        if state["scale"].numel() != 1:
            raise ValueError(f"{path}: scale is of shape {tuple(state['scale'].shape)}: one number was expected")
        unet = {k[5:]: v for k, v in state.items() if k.startswith("unet.")}
        for module in {name.split(".")[0] for name in self.unet.state_dict()} & set(optional):
            if not any(name.startswith(f"{module}.") for name in unet):
                unet |= {f"{module}.{k}": v for k, v in getattr(self.unet, module).state_dict().items()}
        load_into(self.unet, unet, path)
        if self.gaussian is not None:
            load_into(self.gaussian, {k[9:]: v for k, v in state.items() if k.startswith("gaussian.")}, path)
        self.scale.copy_(state["scale"].reshape(()))

    def _save_vocabulary(self, folder):
        """Copy the vocabulary that was given to the conditioner; those of installed packages are not copied."""
        if self.clap.vocabulary is None or Path(self.clap.vocabulary).resolve() == folder.resolve():
            return
        for given in (Path(self.clap.vocabulary) / name for name in VOCABULARY):
            if given.is_file():
                with atomic_write(folder / given.name) as temporary:
                    shutil.copyfile(given, temporary)

    def _part(self, part):
        return {"vae": self.vae, "hifigan": self.vocoder, "clap": self.clap}[part]

    def _ldm_state(self):
        if self.loras is not None:
            raise ValueError("the U-Net has LoRAs beside its weights: call merge_loras() or remove_loras() before")
        state = {f"unet.{k}": v for k, v in self.unet.state_dict().items()} | {"scale": self.scale}
        if self.gaussian is not None:
            state |= {f"gaussian.{k}": v for k, v in self.gaussian.state_dict().items()}
        return state

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", **changes) -> "RefinedAudioLDM":
        """Load a folder written by `save`, in evaluation mode; `changes` as in `preset`.

        Raises FileNotFoundError for a missing file, ValueError for one that does not fit.

        Notebook: 05
        """
        folder = Path(folder)
        for lora in (folder, folder / "lora.safetensors"):
            if lora.name == "lora.safetensors" and lora.is_file() and not (folder / "config.yaml").is_file():
                raise ValueError(
                    f"{lora} is a LoRA: load the model that it was trained on, and this beside it (--lora, load_lora)"
                )
        if folder.is_file() or (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} is no folder written by RefinedAudioLDM.save: convert it first (`refined-ldm "
                f"convert {folder} FOLDER`) and give that folder"
            )
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"no config.yaml in {folder}: give a folder written by RefinedAudioLDM.save")
        config = load_config(folder / "config.yaml").changed(**changes)
        model = cls(config, clap=_load_clap(config, folder))
        for part in ("vae", "ldm"):
            model.load_part(part, folder)
        if model.config.vocoder == "hifigan" or part_path(folder, "hifigan", model.config).is_file():
            model.load_part("hifigan", folder)  # a run has no vocoder until it is trained
        if (folder / STUDENT_FILE).is_file():
            model.load_student(folder / STUDENT_FILE)
        return model.to(device, non_blocking=True).eval()

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
        if is_shipped(name):
            return cls.load(WEIGHTS / name, device, **changes)
        return cls(preset(name, **changes)).to(device, non_blocking=True).eval()


def is_constant(latent: torch.Tensor) -> torch.Tensor:
    """Return a mask (B,) of the latents (B, C, T, F) that hold one value throughout, as after an underflow."""
    flat = latent.flatten(1)
    return torch.eq(flat, flat[:, :1]).all(1)
