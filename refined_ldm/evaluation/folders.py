"""Two folders of sounds compared: are the generated ones like the real ones, and how sure may we be?

Every clip passes through an embedding, by default one that nobody here trained. The numbers are those of `metrics`;
each is told with its interval over other clips, and with what it is to be held against.
"""

import json
import os
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path, PurePath

import soundfile
import soxr
import torch

from refined_ldm.audio import SILENCE, audio_seconds, load_audio
from refined_ldm.data.captioned_audio import AUDIO_SUFFIXES
from refined_ldm.data.tables import clean_caption, field, read_rows
from refined_ldm.evaluation.embeddings.registry import open_embedding
from refined_ldm.evaluation.scores import METRICS, FolderEmbeddings, Score, count_scores
from refined_ldm.files import atomic_write

RESAMPLER = f"soxr HQ {soxr.__version__}"  # what `load_audio` uses, at its default quality


@dataclass(frozen=True)
class Side:
    """One of the two folders."""

    folder: str
    clips: int  # that can be used
    silent: int  # of them
    longest: float  # seconds
    sample_rates: tuple[int, ...]  # Hz, of the files themselves
    skipped: tuple[str, ...]  # the other files, each with the reason


@dataclass(frozen=True)
class Comparison:
    """What `compare_folders` found."""

    generated: Side
    reference: Side
    embedding: dict  # name, version, sha256, dimensions, sample_rate and read_at (Hz), resampler, heard_seconds
    pca: int | None  # dimensions of the Frechet distances; None: all
    seed: int
    scores: tuple[Score, ...]
    left_out: dict[str, str]  # metric -> why
    notes: tuple[str, ...]

    def to_dict(self):
        """For JSON."""
        return asdict(self)

    def save(self, path):
        """Write it as JSON, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self):
        """For people."""
        e, reasons = self.embedding, {}
        for metric, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(METRICS[metric])
        lines = [
            _told("generated", self.generated),
            _told("reference", self.reference),
            f"embedding  {e['version']} (sha256 {e['sha256'][:12]}…), {e['dimensions']} numbers, hears "
            f"{e['sample_rate']} Hz; files read at {e['read_at']} Hz by {e['resampler']}",
            f"PCA        Frechet distances in {self.pca or 'all'} dimensions",
            "",
            f"{'metric':28}{'value':>10}   {'95 % interval':^21}{'same n':>12}{'floor':>12}   what scores the floor",
        ]
        for s in self.scores:
            same, lowest = ("" if x is None else f"{x:.4g}" for x in (s.same_size, s.floor))
            interval = f"{s.low:9.4g} … {s.high:<9.4g}"
            lines.append(f"{METRICS[s.metric]:28}{s.value:10.4g}   {interval}{same:>12}{lowest:>12}   {s.floor_of}")
        lines += ["", *(f"left out: {', '.join(metrics)}: {reason}" for reason, metrics in reasons.items())]
        return "\n".join([*lines, *self.notes]).rstrip()


def _told(which, side):
    more = [f"{side.silent} of them silent"] if side.silent else []
    more += [f"{len(side.skipped)} unusable left out"] if side.skipped else []
    return f"{which:11}{side.folder}: {', '.join([f'{side.clips} clips', *more])}"


# Files


def _check_apart(generated, reference):
    a, b = generated.resolve(), reference.resolve()
    if a == b:
        raise ValueError(f"{generated} and {reference} are the same folder: every distance would be 0")
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ValueError(f"one of {generated} and {reference} is inside the other, and folders are searched to the "
                         "bottom: put them side by side")  # fmt: skip


def _sounds(folder):
    """All sound files in a folder and below it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    return sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: path.as_posix())


def _load(path, ear, sample_rate):
    """-> (1, N) at the embedding's rate, by way of `sample_rate`; no more than it hears."""
    waveform = load_audio(path, sample_rate or ear.sample_rate, ear.seconds)
    if sample_rate and sample_rate != ear.sample_rate:
        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), sample_rate, ear.sample_rate))
    if len(waveform) < ear.shortest:
        raise ValueError(f"{path}: {len(waveform) / ear.sample_rate:.3f} s are less than the embedding's window of "
                         f"{ear.shortest / ear.sample_rate:.3f} s")  # fmt: skip
    return waveform[None]


def _look(folder, ear, sample_rate, tell):
    """Decode every file of a folder -> the paths of those that can be used, what there is to say of all."""
    good, silent, longest, rates, faults = [], 0, 0.0, set(), []
    for path in _sounds(folder):
        try:
            waveform = _load(path, ear, sample_rate)
            silent += int(waveform.abs().max() < SILENCE)
            longest = max(longest, audio_seconds(path))
            good.append(path)
            rates.add(soundfile.info(path).samplerate)
        except soundfile.LibsndfileError:
            pass  # it was read by audioread, which knows more formats
        except (ValueError, OSError) as fault:
            faults.append(str(fault))
        tell()
    return good, Side(str(folder), len(good), silent, longest, tuple(sorted(rates)), tuple(faults))


def _names(paths, folder):
    """By what files of two folders are paired: the path without its ending."""
    return [path.relative_to(folder).with_suffix("").as_posix() for path in paths]


def read_captions(path):
    """A CSV file with the columns `file` and `caption` -> {name without ending: its first caption}."""
    captions = {}
    for number, row in read_rows(path, ("file", "caption")):
        if row["file"] and row["caption"]:  # a clip may have none
            try:
                file, caption = PurePath(field(row, "file")), clean_caption(field(row, "caption"))
            except ValueError as fault:
                raise ValueError(f"{path}, line {number}: {fault}") from fault
            captions.setdefault(os.path.splitext(file.as_posix())[0], caption)
    return captions


def _listen(paths, folder, ear, sample_rate, tell):
    rows, classes = [], []
    for path in paths:
        heard, probabilities = ear.hear(_load(path, ear, sample_rate))
        rows.append(heard.double().cpu().numpy())
        classes += [] if probabilities is None else [probabilities]
        tell()
    return FolderEmbeddings(_names(paths, folder), rows, torch.cat(classes).numpy() if classes else None)


# The comparison


def compare_folders(generated, reference, embedding="aisfx", checkpoint=None, captions=None, pca=64, skip_bad=False,
                    seed=0, sample_rate=None, tokenizer=None, device="cpu", on_clips=None):  # fmt: skip
    """Compare a folder of generated sounds with a folder of real ones -> Comparison.

    captions: a CSV file with the columns `file` and `caption`, named like the generated files. pca: Frechet distances
    are between projections onto so many main directions of the reference, or as many as half of it has; 0 takes all.
    sample_rate: read both at this rate first (Hz), so that highs that one side cannot have do not count. Files that
    cannot be used are a ValueError that names all of them, or with skip_bad left out. on_clips(stage, done, all)
    reports progress.
    """
    folders = Path(generated), Path(reference)
    files = sum(len(_sounds(folder)) for folder in folders)
    _check_apart(*folders)
    said = read_captions(captions) if captions else {}
    ear = open_embedding(embedding, checkpoint, tokenizer, device)

    tell = _progress(on_clips, "checking", files)
    (made, made_side), (real, real_side) = (_look(folder, ear, sample_rate, tell) for folder in folders)
    faults = made_side.skipped + real_side.skipped
    if faults and not skip_bad:
        raise ValueError("\n  ".join([f"{len(faults)} of {files} files cannot be used; --skip-bad (skip_bad=True) "
                                      "leaves them out:", *faults]))  # fmt: skip
    for side in (made_side, real_side):
        if side.clips < 2:
            raise ValueError(f"{side.folder} holds {side.clips} usable sound files, 2 are the least; looked for are "
                             f"{' '.join(sorted(AUDIO_SUFFIXES))}")  # fmt: skip
    names = _names(made, folders[0])
    captioned = [i for i, name in enumerate(names) if name in said]
    if captions and not captioned:
        raise ValueError(f"{captions} names none of the clips in {generated}: {next(iter(said), 'nothing')!r} is no "
                         f"{names[0]!r}")  # fmt: skip
    text = ear.read([said[names[i]] for i in captioned]) if ear.read and captioned else None

    tell = _progress(on_clips, "listening", len(made) + len(real))
    g, r = _listen(made, folders[0], ear, sample_rate, tell), _listen(real, folders[1], ear, sample_rate, tell)
    rows, dimensions = r.together().shape
    kept = min(pca, max(1, rows // 2 - 1), dimensions) if pca else None  # as many as halves have, for the floor
    scores, left_out = count_scores(g, r, captioned, text, kept, seed, _progress(on_clips, "counting", len(METRICS)))
    told = {"name": embedding, "version": ear.version, "sha256": ear.sha256, "dimensions": dimensions,
            "sample_rate": ear.sample_rate, "read_at": sample_rate or ear.sample_rate, "resampler": RESAMPLER,
            "heard_seconds": ear.seconds}  # fmt: skip
    notes = _notes(made_side, real_side, told, pca, kept, rows, len(made) - len(captioned) if captions else 0)
    return Comparison(made_side, real_side, told, kept, seed, scores, left_out, tuple(notes))


def _notes(generated, reference, embedding, pca, kept, rows, uncaptioned):
    """What a reader of the table has to know."""
    half, window = reference.clips // 2, embedding["heard_seconds"]
    if kept and kept < pca:
        yield f"of the {pca} PCA dimensions that were asked for, a half of the reference has {kept}"
    if half > 1:
        yield (
            f"same n: the distance of {min(half, generated.clips)} generated clips to {half} real ones, to be held "
            "against the floor; a Frechet distance falls with more clips, a kernel distance does not"
        )
    highest = [max(side.sample_rates, default=0) for side in (generated, reference)]
    if highest[0] != highest[1] and min(highest) < embedding["read_at"]:
        yield (
            f"the generated files have {highest[0]} Hz and the references {highest[1]} Hz: highs that only one side "
            f"can have count as a difference; a sample rate of {min(highest)} would read both alike"
        )
    if window and max(generated.longest, reference.longest) > window:
        yield f"of clips longer than {window} s only the start is heard"
    if rows > reference.clips:
        yield "Frechet distances are between all windows, kernel distances between the means of clips"
    if uncaptioned:
        yield f"{uncaptioned} of {generated.clips} generated clips have no caption"


def _progress(on_clips, stage, total):
    done = count(1)
    return lambda: on_clips and on_clips(stage, next(done), total)
