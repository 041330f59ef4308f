"""Two folders of sounds compared: are the generated ones like the real ones, and how sure may we be?

Every clip passes through an embedding, by default one that nobody here trained. The numbers are those of `metrics`;
each is told with its interval over other clips, and with what it is to be held against.
"""

import json
import os
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path, PurePosixPath

import soxr
import torch

from refined_ldm.audio import SILENCE, audio_info, load_audio
from refined_ldm.data.listing import AUDIO_SUFFIXES, find_files, is_sound, pair, passed_over, without_ending
from refined_ldm.data.tables import clean_caption, field, read_rows
from refined_ldm.evaluation.embeddings.registry import open_embedding
from refined_ldm.evaluation.scores import METRICS, FolderEmbeddings, Score, count_scores
from refined_ldm.files import atomic_write
from refined_ldm.integers import whole, whole_rate, whole_seed

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


def _check_different(generated, reference):
    """Raise ValueError if links lead from both folders to the same files."""
    real = {os.path.realpath(path): path for path in reference}
    if both := [path for path in generated if os.path.realpath(path) in real]:
        raise ValueError(f"{len(both)} files are in both folders by way of links, {both[0]} and "
                         f"{real[os.path.realpath(both[0])]}: each must be in one")  # fmt: skip


def _sounds(folder, captions):
    """All sound files in a folder and below it, links to folders followed -> paths, what but `captions` is no sound."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files, repeated = find_files(folder)
    sounds = sorted(filter(is_sound, files), key=lambda path: path.as_posix())
    others = set(files) - set(sounds) - {captions and Path(captions)}
    return sounds, passed_over(map(str, others), folders_that_a_link_leads_to_again=repeated)


def _load(path, ear, sample_rate):
    """-> (1, N) at the embedding's rate, by way of `sample_rate`; no more than it hears."""
    waveform = load_audio(path, sample_rate or ear.sample_rate, ear.seconds)
    if sample_rate and sample_rate != ear.sample_rate:
        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), sample_rate, ear.sample_rate))
    if len(waveform) < ear.shortest:
        raise ValueError(f"{path}: {len(waveform) / ear.sample_rate:.3f} s are less than the embedding's window of "
                         f"{ear.shortest / ear.sample_rate:.3f} s")  # fmt: skip
    return waveform[None]


def _look(folder, paths, ear, sample_rate, tell):
    """Decode every sound of a folder -> the paths of those that can be used, what there is to say of all."""
    good, silent, longest, rates, faults = [], 0, 0.0, set(), []
    for path in paths:
        try:
            waveform = _load(path, ear, sample_rate)
            silent += int(waveform.abs().max() < SILENCE)
            length, rate = audio_info(path)
            longest = max(longest, length)
            rates.add(rate)
            good.append(path)
        except (ValueError, OSError) as fault:
            faults.append(str(fault))
        tell()
    return good, Side(str(folder), len(good), silent, longest, tuple(sorted(rates)), tuple(faults))


def _names(paths, folder):
    """By what files of two folders are paired: the path without its ending."""
    return [path.relative_to(folder).with_suffix("").as_posix() for path in paths]


def read_captions(path):
    """A CSV file with the columns `file` and `caption` -> {name as it is written: its first caption}."""
    captions = {}
    for number, row in read_rows(path, ("file", "caption")):
        if row["file"] and row["caption"]:  # a clip may have none
            try:
                file, caption = PurePosixPath(field(row, "file")), clean_caption(field(row, "caption"))
            except ValueError as fault:
                raise ValueError(f"{path}, line {number}: {fault}") from fault
            captions.setdefault(os.path.normpath(file), caption)
    return captions


def captions_of(names, captions):
    """For files (paths below their folder) and {name: caption} of a table -> ({file: caption}, names of no file).

    A row belongs to the file with its whole name, else to those that differ in the ending or in upper and lower case.
    Raises ValueError if rows with different captions could be meant.
    """
    pairs, left = pair(names, {name: name for name in captions})
    for file, rows in pairs.items():
        if len({captions[row] for row in rows}) > 1:
            raise ValueError(f"which caption is that of {file}? {' and '.join(map(repr, rows))} name it equally well: "
                             "give its whole name")  # fmt: skip
    return {file: captions[rows[0]] for file, rows in pairs.items()}, left


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
    pca, seed = whole("pca", pca or 0, 0), whole_seed(seed)
    sample_rate = None if sample_rate is None else whole_rate(sample_rate)
    folders = Path(generated), Path(reference)
    (paths, passed), (real_paths, real_passed) = (_sounds(f, captions) for f in folders)
    files = len(paths) + len(real_paths)
    _check_apart(*folders)
    _check_different(paths, real_paths)
    said = read_captions(captions) if captions else {}
    ear = open_embedding(embedding, checkpoint, tokenizer, device)

    tell = _progress(on_clips, "checking", files)
    made, made_side = _look(folders[0], paths, ear, sample_rate, tell)
    real, real_side = _look(folders[1], real_paths, ear, sample_rate, tell)
    faults = made_side.skipped + real_side.skipped
    if faults and not skip_bad:
        raise ValueError("\n  ".join([f"{len(faults)} of {files} files cannot be used; --skip-bad (skip_bad=True) "
                                      "leaves them out:", *faults]))  # fmt: skip
    for side in (made_side, real_side):
        if side.clips < 2:
            raise ValueError(f"{side.folder} holds {side.clips} usable sound files, 2 are the least; looked for are "
                             f"{' '.join(sorted(AUDIO_SUFFIXES))}")  # fmt: skip
    names = _names(made, folders[0])
    whole_names = [path.relative_to(folders[0]).as_posix() for path in made]
    said_of, unnamed = captions_of(whole_names, said)
    captioned = [i for i, name in enumerate(whole_names) if name in said_of]
    if captions and not captioned:
        first = without_ending(next(iter(said), "nothing"))
        raise ValueError(f"{captions} names none of the clips in {generated}: {first!r} is no {names[0]!r}")
    text = ear.read([said_of[whole_names[i]] for i in captioned]) if ear.read and captioned else None

    tell = _progress(on_clips, "listening", len(made) + len(real))
    g, r = _listen(made, folders[0], ear, sample_rate, tell), _listen(real, folders[1], ear, sample_rate, tell)
    rows, dimensions = r.together().shape
    kept = min(pca, max(1, rows // 2 - 1), dimensions) if pca else None  # as many as halves have, for the floor
    scores, left_out = count_scores(g, r, captioned, text, kept, seed, _progress(on_clips, "counting", len(METRICS)))
    told = {"name": embedding, "version": ear.version, "sha256": ear.sha256, "dimensions": dimensions,
            "sample_rate": ear.sample_rate, "read_at": sample_rate or ear.sample_rate, "resampler": RESAMPLER,
            "heard_seconds": ear.seconds}  # fmt: skip
    notes = _notes(made_side, real_side, told, pca, kept, rows, len(made) - len(captioned) if captions else 0)
    more = [f"passed over in {generated}: {passed}"] * bool(passed)
    more += [f"passed over in {reference}: {real_passed}"] * bool(real_passed)
    more += [f"{len(unnamed)} rows of {captions} name no generated clip: {', '.join(unnamed[:3])}"] * bool(unnamed)
    return Comparison(made_side, real_side, told, kept, seed, scores, left_out, (*notes, *more))


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
