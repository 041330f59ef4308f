"""Make what the documents let you hear and see move, with the shipped weights: `make listen`.

Writes docs/sounds/NAME.mp3, docs/sounds/sounds.csv (captions, seeds and verdicts, from which the tables of the
documents are written), docs/images/sounds.png and docs/images/denoising.gif. The verdicts in `SOUNDS` were given by
comparing each sound with its caption: after a change of weights, listen again and correct them.
"""

import csv
import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
from PIL import Image

from refined_ldm import RefinedAudioLDM, display
from refined_ldm.conditioning import guided_noise
from refined_ldm.devices import fitting_threads
from refined_ldm.diffusion import clean_latent, dpmpp_sample, noise_like
from refined_ldm.model_folder import WEIGHTS
from refined_ldm.randomness import caption_generators

DOCS = Path(__file__).resolve().parent
TABLE = DOCS / "sounds" / "sounds.csv"
SOUND_LIMIT, ANIMATION_LIMIT = 30_000, 1_000_000  # bytes


@dataclass(frozen=True)
class Sound:
    """One sound: file name, caption, seed, and how well it follows the caption: right, partly or wrong, and why."""

    name: str
    caption: str
    seed: int
    verdict: str
    reason: str


SOUNDS = (
    Sound("dog_bell", "a dog barks, then a bell rings", 0, "right", "two barks, then one stroke of a bell"),
    Sound("bell_dog", "a bell rings, then a dog barks", 0, "right", "the other order"),
    Sound("thunder", "thunder rolls while a bird chirps", 0, "right", "low thunder below high chirps"),
    Sound("dog", "a dog barks twice", 0, "right", "two barks"),
    Sound("piano", "a piano plays two high notes", 0, "partly", "a faint third note"),
    Sound("flute", "a flute plays three high notes", 0, "wrong", "only two notes"),
)
ANIMATED = SOUNDS[2]


def shipped_digest() -> str:
    """Return the sha256 of the shipped parts that make a sound: sounds of other weights are stale."""
    parts = ("clap-tiny-gpt2", "ldm", "student", "matcher", "refiner", "vae", "hifigan")
    return hashlib.sha256(b"".join((WEIGHTS / "tiny" / f"{p}.safetensors").read_bytes() for p in parts)).hexdigest()


def write_sounds(model: RefinedAudioLDM) -> None:
    """Write an MP3 file for each entry of `SOUNDS`, their spectrograms, and the table."""
    waveforms = torch.cat([model.generate([sound.caption], seed=sound.seed) for sound in SOUNDS])
    for sound, waveform in zip(SOUNDS, waveforms.numpy(), strict=True):
        path = DOCS / "sounds" / f"{sound.name}.mp3"
        soundfile.write(path, waveform, model.config.mel.sample_rate, format="MP3", compression_level=0.3)
        size = path.stat().st_size
        if size > SOUND_LIMIT:
            raise ValueError(f"{path.name} has {size} bytes, {SOUND_LIMIT} is the limit: raise compression_level")
    titles = [f"{sound.caption}\n{sound.verdict}: {sound.reason}" for sound in SOUNDS]
    figure = display.plot_mels(model.mel(waveforms), (), model.config.mel, columns=3, size=(3.4, 2.1))
    for ax, title in zip(figure.axes, titles, strict=False):
        ax.set_title(title, fontsize=9, loc="left")
    figure.savefig(DOCS / "images" / "sounds.png", dpi=100)
    with open(TABLE, "w", newline="", encoding="utf-8") as file:
        rows = [asdict(sound) | {"weights": shipped_digest()} for sound in SOUNDS]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def denoising(model: RefinedAudioLDM, sound: Sound, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `sound` -> the latents z_t (steps + 1, C, T, F) on the way, and the log-mels they decode to, once clean.

    Entry k is what stands before step k + 1; the last entry is the result.
    """
    embedding, unconditional = model.clap.embed_text([sound.caption]), model.clap.embed_text([""])[0]
    z_T = noise_like(
        embedding.new_empty(1, *model.latent_shape(model.config.seconds)),
        caption_generators([sound.caption], sound.seed),
    )
    noisy, clean = [], []

    def denoise(z_t, t, c):
        eps = guided_noise(model.denoise, z_t, t, c, unconditional, model.config.guidance_scale)
        noisy.append(z_t)
        clean.append(clean_latent(z_t, eps, t, model.schedule))
        return eps

    with fitting_threads(model.unet, z_T.numel() // z_T.shape[1], model.device):  # as generate: the same bits
        result = dpmpp_sample(denoise, z_T, embedding, model.schedule, steps)
    result = model.refine(result, embedding, caption_generators([sound.caption], f"{sound.seed}, refined"))
    return torch.cat([*noisy, result]), model.decode(torch.cat([*clean, result]))


def write_animation(model: RefinedAudioLDM, sound: Sound, steps: int = 25) -> None:
    """Write denoising.gif: on the left the latent, on the right the spectrogram that it would decode to."""
    latents, mels = denoising(model, sound, steps)
    frames = [_frame(model, sound, k, steps, latents[k], mels[k]) for k in range(steps + 1)]
    palette = _palette()
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path = DOCS / "images" / "denoising.gif"
    durations = [160] * steps + [2500]  # ms
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    size = path.stat().st_size
    if size > ANIMATION_LIMIT:
        raise ValueError(f"{path.name} has {size} bytes, {ANIMATION_LIMIT} is the limit: take fewer steps")


def _palette() -> Image.Image:
    """Return an image with the 256 colours of the animation: the spectrogram's and the latent's."""
    colours = np.concatenate([plt.get_cmap(n)(np.linspace(0, 1, k))[:, :3] for n, k in (("magma", 192), ("gray", 64))])
    image = Image.new("P", (1, 1))
    image.putpalette((255 * colours).round().astype(np.uint8).tobytes())
    return image


def _frame(model, sound, k, steps, latent, mel) -> Image.Image:
    figure = plt.figure(figsize=(9, 3), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    channels = latent.transpose(1, 2).flip(1)  # (C, F, T), low frequencies at the bottom
    tiles = torch.nn.functional.pad(channels, (1, 1, 1, 1), value=math.nan)
    rows = [torch.cat(list(row), 1) for row in tiles.split(2)]
    left.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    left.set_axis_off()
    left.set_title(f"latent, {len(latent)} channels: step {k} of {steps}", loc="left", fontsize=11)
    display.plot_mel(mel, model.config.mel, f"spectrogram: \u201c{sound.caption}\u201d", right)
    right.images[0].set_clim(40, 110)  # the same in every frame
    right.title.set_fontsize(11)
    figure.canvas.draw()
    frame = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return frame


def main() -> None:
    matplotlib.use("Agg")
    plt.rcParams["axes.titlelocation"] = "left"
    model = RefinedAudioLDM.from_preset("tiny")
    write_sounds(model)
    write_animation(model, ANIMATED)
    for path in sorted([*DOCS.glob("sounds/*"), *DOCS.glob("images/*")]):
        print(f"{path.relative_to(DOCS.parent)}: {path.stat().st_size / 1000:.0f} kB")
    print("Listen to each sound, and correct its verdict in docs/listen.py if it does not hold.")


if __name__ == "__main__":
    main()
