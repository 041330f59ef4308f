"""The commands that take a sound: edit, inpaint, extend, upsample, loop. Heavy imports are inside their functions."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from refined_ldm.base.integers import real
from refined_ldm.cli.parser import Parser
from refined_ldm.cli.sounds import open_model, optimized, progress, say_written, write_picture

if TYPE_CHECKING:
    import torch

    from refined_ldm.text_to_audio import RefinedAudioLDM

EXAMPLES = {
    "edit": 'refined-ldm edit dog.wav "a bird chirps" --strength 0.6 --out runs/edited',
    "inpaint": 'refined-ldm inpaint street.wav "rain falls" --start 1.2 --end 2 --out runs/edited',
    "extend": 'refined-ldm extend rain.wav "rain falls" --seconds 5 --out runs/edited',
    "upsample": 'refined-ldm upsample telephone.wav "a telephone rings" --out runs/edited',
    "loop": 'refined-ldm loop "crickets chirp" --seconds 5 --out runs/edited',
}


def add_commands(command: Callable[[str, str], Parser]) -> None:
    """Add the commands; command(name, help) makes the parser of one."""

    def sampling(sub: Parser) -> None:
        sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the WAV file")
        sub.model()
        sub.shared("--steps", "--guidance", "--seed", "--negative")
        sub.shared("--candidates", default=1)
        sub.add_argument("--picture", action="store_true", help="also write the spectrograms before and after")
        sub.shared("--device", "--precision", "--json")

    def sound(name: str, text: str) -> Parser:
        sub = command(name, text)
        sub.add_argument(
            "input", type=Path, metavar="FILE", help="a sound file; other rates and channels are converted"
        )
        return sub

    sub = sound("edit", "Change a sound into one of a caption, as far as --strength says.")
    sub.add_argument("caption", metavar="CAPTION")
    sub.add_argument("--strength", type=real(0, 1), default=0.5, help="0 keeps the sound, 1 only its level (0.5)")
    sub.add_argument("--method", choices=("sdedit", "inversion", "diffedit"), default="sdedit",
                     help="inversion keeps more of the sound, and takes longer; diffedit is inversion in the one "
                     "stretch in which the captions differ")  # fmt: skip
    sub.add_argument("--source", default="", metavar="CAPTION", help="for these two: what the sound is")
    sampling(sub)

    sub = sound("inpaint", "Redraw a stretch of a sound, a band of frequencies, or both; the rest is kept as it is.")
    sub.add_argument("caption", metavar="CAPTION", help="of the whole sound")
    sub.add_argument("--start", type=real(0), metavar="S", help="second at which the stretch begins")
    sub.add_argument("--end", type=real(0), metavar="S", help="second at which it ends")
    sub.add_argument("--band", type=real(0), nargs=2, metavar=("LOW", "HIGH"), help="band to redraw, in Hz")
    sampling(sub)

    sub = sound("extend", "Continue a sound.")
    sub.add_argument("caption", metavar="CAPTION", help="of the whole sound")
    sub.add_argument("--seconds", type=real(above=0), required=True, metavar="S", help="seconds to add")
    sampling(sub)

    sub = sound("upsample", "Draw the high frequencies that a sound lacks.")
    sub.add_argument("caption", metavar="CAPTION", nargs="?", default="", help="what the sound is")
    sub.add_argument("--cutoff", type=real(above=0), metavar="HZ", help="the file has nothing above it (default: "
                     ".45 of its sample rate)")  # fmt: skip
    sampling(sub)

    sub = command("loop", "Make a sound that repeats without a seam, from a caption or from a sound.")
    sub.add_argument("caption", metavar="CAPTION")
    sub.add_argument("--input", type=Path, metavar="FILE", help="a sound whose ends are joined")
    sub.add_argument("--seconds", type=real(0.01), metavar="S", help="length without --input (default: the preset's)")
    sampling(sub)


def edit(options: Namespace) -> None:
    """Change a sound into one of a caption."""
    _make(options, lambda model, sound, settings: model.edit(
        sound, options.caption, options.strength, options.method, options.source, **settings
    ))  # fmt: skip


def inpaint(options: Namespace) -> None:
    """Redraw a stretch or a band of a sound."""
    _make(options, lambda model, sound, settings: model.inpaint(
        sound, options.caption, options.start, options.end, options.band and tuple(options.band), **settings
    ))  # fmt: skip


def extend(options: Namespace) -> None:
    """Continue a sound."""
    _make(options, lambda model, sound, settings: model.extend(sound, options.caption, options.seconds, **settings))


def upsample(options: Namespace) -> None:
    """Draw the high frequencies of a sound."""
    from refined_ldm.audio import audio_info

    _, rate = audio_info(options.input)  # the sound is read at the model's rate; its own says what it lacks

    def make(model: "RefinedAudioLDM", sound: "torch.Tensor", settings: dict) -> "torch.Tensor":
        lacks = options.cutoff is None and rate < model.config.mel.sample_rate
        return model.super_resolve(sound, options.caption, 0.45 * rate if lacks else options.cutoff, **settings)

    _make(options, make)


def loop(options: Namespace) -> None:
    """Make a sound that repeats without a seam."""
    _make(options, lambda model, sound, settings: model.loop(options.caption, options.seconds, sound, **settings))


def _make(options: Namespace, make: Callable[["RefinedAudioLDM", "torch.Tensor | None", dict], "torch.Tensor"]) -> None:
    """Read the sound, have `make` make another of it, and write that."""
    from refined_ldm.audio import audio_info, load_audio
    from refined_ldm.base.files import check_folder
    from refined_ldm.data.names import SoundFolder, caption_name
    from refined_ldm.devices import pick_device

    stem = f"{caption_name(options.input.stem if options.input else options.caption)}-{options.command}-{options.seed}"
    check_folder(options.out, [f"{stem}.wav"])
    if options.picture:
        import_module("refined_ldm.display.spectrograms")  # a package that is missing is named before any work
    if options.input:
        audio_info(options.input)  # a file that is none is refused before the model is loaded
    device = pick_device(options.device)
    model = optimized(open_model(options, device), options)
    rate = model.config.mel.sample_rate
    sound = load_audio(options.input, rate) if options.input else None
    start, notes = time.perf_counter(), []
    with progress(unit="step") as on_step:
        settings = {"steps": options.steps, "guidance_scale": options.guidance, "seed": options.seed,
                    "negative_caption": options.negative, "candidates": options.candidates, "on_step": on_step,
                    "on_note": notes.append}  # fmt: skip
        made = make(model, sound, settings)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    path = SoundFolder(options.out).add(stem, made, rate)
    written = {"file": str(path), "input": str(options.input) if options.input else None, "caption": options.caption,
               "seed": options.seed, "seconds": len(made) / rate}  # fmt: skip
    if options.picture:
        written["picture"] = str(_draw(model, sound, made, path.with_suffix(".png"), options))
    say_written([written], start, options.json, notes)


def _draw(
    model: "RefinedAudioLDM", sound: "torch.Tensor | None", made: "torch.Tensor", path: Path, options: Namespace
) -> Path:
    """Write the spectrograms before and after -> the path of the picture."""
    from refined_ldm.display import plot_waveform_mels

    sounds, titles = [made], [f"{options.command}: {options.caption}"]
    if sound is not None:
        sounds, titles = [sound, made], [options.input.name, *titles]
    return write_picture(plot_waveform_mels(sounds, titles, model.config.mel), path)


COMMANDS = (edit, inpaint, extend, upsample, loop)
