"""The whole model: caption -> CLAP embedding -> latent diffusion -> VAE decoder -> HiFi-GAN -> waveform."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from refined_ldm.checkpoints import load_into, read_weights, save_weights
from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.conditioning import guided_noise
from refined_ldm.config import Config, load_config, preset
from refined_ldm.diffusion import NoiseSchedule, ddim_sample, dpmpp_sample, noise_like, to_noise
from refined_ldm.gaussian import GaussianDenoiser
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.mel import MelSpectrogram, griffin_lim
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE

WEIGHTS = Path(__file__).parent / "weights"  # what is shipped: weights/tiny


class RefinedAudioLDM(nn.Module):
    """Captions -> waveforms. Parts: `clap`, `unet`, `vae`, `vocoder`, `mel`, `schedule` and the latent `scale`."""

    def __init__(self, config: Config, seed=0):
        """Fresh random weights drawn from `seed`."""
        super().__init__()
        if config.clap not in CLAP_PRESETS:
            raise ValueError(f"no conditioner {config.clap!r}: choose one of {', '.join(CLAP_PRESETS)}")
        self.config = config
        self.schedule = NoiseSchedule.ldm(config.diffusion_steps, config.beta_start, config.beta_end)
        self.mel = MelSpectrogram(config.mel)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.clap = Clap(CLAP_PRESETS[config.clap])
            self.vae = MelVAE(config.vae)
            self.unet = UNet(config.unet)
            self.vocoder = HiFiGAN(config.vocoder, config.mel)
        if self.clap.embedding_dim != config.unet.embedding_dim:
            raise ValueError(f"{config.clap} embeds in {self.clap.embedding_dim} numbers, the U-Net expects "
                             f"{config.unet.embedding_dim}: change unet.embedding_dim")  # fmt: skip
        self.gaussian = None
        if config.parameterization == "gaussian":
            bins = config.mel.n_mels // config.vae.downsampling
            self.gaussian = GaussianDenoiser(config.vae.latent_channels, bins)
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
        if self.config.inversion == "griffin_lim":
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
        return self.gaussian.noise(z_t, alpha_bar) + spread * prediction

    # --- caption in, sound out ---

    @torch.no_grad()
    def generate(
        self, captions, seconds=None, steps=None, guidance_scale=None, seed=0, negative_caption="", sampler="dpmpp",
        eta=1.0, candidates=1, on_step=None,
    ):  # fmt: skip
        """Captions (a list of B strings) -> waveforms (B, N) in [-1, 1], N = seconds * 16000.

        None takes the preset's value. The noise of a caption depends on `seed` and on the caption alone, so its sound
        does not change with the others in the list. negative_caption: what guidance moves away from. sampler: "dpmpp",
        or "ddim" with its eta. candidates: how many to draw per caption, of which the CLAP embedding keeps the nearest.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions must be a list of strings, got one string: write [{captions!r}]")
        if not captions:
            raise ValueError("captions is empty: give at least one")
        if sampler not in ("dpmpp", "ddim"):
            raise ValueError(f"sampler must be dpmpp or ddim, got {sampler!r}")
        seconds = self.config.seconds if seconds is None else seconds
        if not 0.01 <= seconds <= 120:
            raise ValueError(f"seconds must be between 0.01 and 120, got {seconds}")
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {candidates}")
        repeated = [caption for caption in captions for _ in range(candidates)]
        embedding = self.clap.embed_text(repeated)
        generators = self._generators(repeated, seed)
        latent = self.sample_latent(
            embedding, noise_like(embedding.new_empty(len(repeated), *self._latent_shape(seconds)), generators),
            steps, guidance_scale, self.clap.embed_text([negative_caption])[0], sampler, eta, generators, on_step,
        )  # fmt: skip
        waveform = self.to_waveform(self.decode(latent))[:, : round(seconds * self.config.mel.sample_rate)]
        if not waveform.isfinite().all():
            raise FloatingPointError("the generated sound holds NaN or infinite samples: try float32, or other weights")
        if candidates == 1:
            return waveform
        nearness = (self.clap.embed_audio(waveform, self.config.mel.sample_rate) * embedding).sum(1)
        best = nearness.view(len(captions), candidates).argmax(1)
        return waveform.view(len(captions), candidates, -1)[torch.arange(len(captions)), best]

    @torch.no_grad()
    def sample_latent(
        self, embedding, z_T, steps=None, guidance_scale=None, unconditional=None, sampler="dpmpp", eta=1.0,
        generator=None, on_step=None,
    ):  # fmt: skip
        """Embeddings (B, D) and noise z_T (B, C, T, F) -> scaled latents, by guided diffusion.

        unconditional: the embedding (D,) that guidance moves away from, that of "" if None; generator: of DDIM's noise.
        """
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if unconditional is None:
            unconditional = self.clap.embed_text([""])[0]

        def guided(z_t, t, c):
            return guided_noise(self.denoise, z_t, t, c, unconditional, guidance)

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
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("vae", "ldm", "hifigan", "clap"):
            self.save_part(part, folder, dtype)
        self.config.save(folder / "config.yaml")

    def save_part(self, part, folder, dtype=torch.float32):
        """Write one part: vae, ldm (U-Net, latent scale and linear denoiser), hifigan or clap."""
        folder = Path(folder)
        if part == "clap":
            self.clap.save(folder / f"clap-{self.config.clap}.safetensors", dtype)
        elif part == "ldm":
            save_weights(folder / "ldm.safetensors", self._ldm_state(), self.config.unet, dtype)
        else:
            save_weights(folder / f"{part}.safetensors", self._part(part), self._part(part).config, dtype)

    def load_part(self, part, folder):
        """Read one part written by `save_part`; raises FileNotFoundError or ValueError (what does not fit)."""
        folder = Path(folder)
        if part == "clap":
            self.clap = Clap.load(self.config.clap, folder / f"clap-{self.config.clap}.safetensors").to(self.device)
            return
        path = folder / f"{part}.safetensors"
        state, _ = read_weights(path)
        if part != "ldm":
            load_into(self._part(part), state, path)
            return
        ours = self._ldm_state()
        if ours.keys() != state.keys():
            odd = ", ".join(sorted(ours.keys() ^ state.keys())[:5])
            raise ValueError(f"{path} does not fit the parameterization {self.config.parameterization!r}: {odd}")
        load_into(self.unet, {k[5:]: v for k, v in state.items() if k.startswith("unet.")}, path)
        if self.gaussian is not None:
            load_into(self.gaussian, {k[9:]: v for k, v in state.items() if k.startswith("gaussian.")}, path)
        self.scale.copy_(state["scale"])

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
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"no config.yaml in {folder}: give a folder written by RefinedAudioLDM.save")
        config = load_config(folder / "config.yaml")
        model = cls(config.changed(**changes))
        for part in ("vae", "ldm", "hifigan", "clap"):
            model.load_part(part, folder)
        return model.to(device).eval()

    @classmethod
    def from_preset(cls, name="tiny", device="cpu", **changes):
        """A preset's model: `tiny` with the shipped weights, any other with fresh ones. `changes` as in `preset`."""
        if (WEIGHTS / name / "config.yaml").is_file():
            return cls.load(WEIGHTS / name, device, **changes)
        return cls(preset(name, **changes)).to(device).eval()
