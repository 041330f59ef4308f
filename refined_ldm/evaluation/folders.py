"""Comparison of a folder of generated sounds with a folder of real ones.

Every clip passes through an embedding, by default one that was trained by others. The metrics are those of `metrics`,
each with its confidence interval and its baseline.

Notebook: 05
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import soxr
import torch

from refined_ldm.audio import SILENCE, audio_info, load_audio
from refined_ldm.base.files import atomic_write
from refined_ldm.base.integers import whole, whole_rate, whole_seed
from refined_ldm.data.listing import AUDIO_SUFFIXES, find_files, is_sound, pair, unused_files, without_ending
from refined_ldm.data.tables import clean_caption, field, read_rows
from refined_ldm.evaluation.embeddings.registry import Embedding, open_embedding
from refined_ldm.evaluation.scores import METRICS, FolderEmbeddings, Score, compute_scores

RESAMPLER = f"soxr HQ {soxr.__version__}"  # what `load_audio` uses, at its default quality


@dataclass(frozen=True)
class Side:
    """One of the two folders."""

    folder: str
    clips: int  # number of usable ones
    silent: int  # number of silent ones among them
    longest: float  # seconds
    sample_rates: tuple[int, ...]  # Hz, of the files themselves
    skipped: tuple[str, ...]  # a line for each unusable file, with the reason


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_folders`."""

    generated: Side
    reference: Side
    embedding: dict[str, Any]  # name, version, sha256, dimensions, sample_rate, read_at (Hz), resampler, window_seconds
    pca: int | None  # dimensions of the Frechet distances; None: all
    seed: int
    scores: tuple[Score, ...]
    left_out: dict[str, str]  # metric -> reason
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the fields as JSON, atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """A text table."""
        e, reasons = self.embedding, {}
        for metric, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(METRICS[metric])
        lines = [
            _line("generated", self.generated),
            _line("reference", self.reference),
            f"embedding  {e['version']} (sha256 {e['sha256'][:12]}…), {e['dimensions']} dimensions, of sounds at "
            f"{e['sample_rate']} Hz; files read at {e['read_at']} Hz by {e['resampler']}",
            f"PCA        Frechet distances in {self.pca or 'all'} dimensions",
            "",
            f"{'metric':28}{'value':>10}   {'95 % interval':^21}{'same n':>12}{'baseline':>12}   of",
        ]
        for s in self.scores:
            same, baseline = ("" if x is None else f"{x:.4g}" for x in (s.same_size, s.baseline))
            interval = f"{s.low:9.4g} … {s.high:<9.4g}"
            numbers = f"{s.value:10.4g}   {interval}{same:>12}{baseline:>12}"
            lines.append(f"{METRICS[s.metric]:28}{numbers}   {s.baseline_of}")
        lines += ["", *(f"left out: {', '.join(metrics)}: {reason}" for reason, metrics in reasons.items())]
        return "\n".join([*lines, *self.notes]).rstrip()


def _line(which: str, side: Side) -> str:
    more = [f"{side.silent} of them silent"] if side.silent else []
    more += [f"{len(side.skipped)} unusable left out"] if side.skipped else []
    return f"{which:11}{side.folder}: {', '.join([f'{side.clips} clips', *more])}"


# Files


def _check_apart(generated: Path, reference: Path) -> None:
    a, b = generated.resolve(), reference.resolve()
    if a == b:
        raise ValueError(f"{generated} and {reference} are the same folder: every distance would be 0")
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ValueError(
            f"one of {generated} and {reference} is inside the other, and subfolders count: put them side by side"
        )


def _check_different(generated: list[Path], reference: list[Path]) -> None:
    """Raise ValueError if links lead from both folders to the same files."""
    real = {os.path.realpath(path): path for path in reference}
    if both := [path for path in generated if os.path.realpath(path) in real]:
        raise ValueError(
            f"{len(both)} files are in both folders by way of links, {both[0]} and "
            f"{real[os.path.realpath(both[0])]}: each must be in one"
        )


def _sounds(folder: Path, captions: str | Path | None) -> tuple[list[Path], str]:
    """All sound files in a folder and its subfolders, also behind links -> their paths, a line about other files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files, repeated = find_files(folder)
    sounds = sorted(filter(is_sound, files), key=lambda path: path.as_posix())
    others = set(files) - set(sounds) - {captions and Path(captions)}
    return sounds, unused_files(map(str, others), folders_that_a_link_leads_to_again=repeated)


def _load(path: Path, embedder: Embedding, sample_rate: int | None) -> torch.Tensor:
    """The part of a file that the embedding uses, (1, N) at its rate; read at `sample_rate` first, if given."""
    rate = embedder.sample_rate
    waveform = load_audio(path, sample_rate or rate, embedder.seconds)
    if sample_rate and sample_rate != rate:
        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), sample_rate, rate))
    if len(waveform) < embedder.shortest:
        raise ValueError(
            f"{path}: {len(waveform) / rate:.3f} s are less than the embedding's window of "
            f"{embedder.shortest / rate:.3f} s"
        )
    return waveform[None]


def _check_files(
    folder: Path, paths: list[Path], embedder: Embedding, sample_rate: int | None, on_file: Callable[[], None]
) -> tuple[list[Path], Side]:
    """Decode every sound of a folder -> the paths of the usable ones, statistics of all."""
    good, silent, longest, rates, faults = [], 0, 0.0, set(), []
    for path in paths:
        try:
            waveform = _load(path, embedder, sample_rate)
            silent += int(waveform.abs().max() < SILENCE)
            length, rate = audio_info(path)
            longest = max(longest, length)
            rates.add(rate)
            good.append(path)
        except (ValueError, OSError) as fault:
            faults.append(str(fault))
        on_file()
    return good, Side(str(folder), len(good), silent, longest, tuple(sorted(rates)), tuple(faults))


def _names(paths: list[Path], folder: Path) -> list[str]:
    """The names by which files of two folders are paired: paths without their endings."""
    return [path.relative_to(folder).with_suffix("").as_posix() for path in paths]


def read_captions(path: str | Path) -> dict[str, str]:
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


def captions_of(names: list[str], captions: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Pair files (paths below their folder) with {name: caption} -> ({file: caption}, the names without a file).

    A row belongs to the file with its whole name, else to those that differ in the ending or in upper and lower case.
    Raises ValueError if rows with different captions match a file equally well.
    """
    pairs, left = pair(names, {name: name for name in captions})
    for file, rows in pairs.items():
        if len({captions[row] for row in rows}) > 1:
            raise ValueError(
                f"which caption is that of {file}? {' and '.join(map(repr, rows))} name it equally well: "
                "give its whole name"
            )
    return {file: captions[rows[0]] for file, rows in pairs.items()}, left


def _embed(
    paths: list[Path], folder: Path, embedder: Embedding, sample_rate: int | None, on_file: Callable[[], None]
) -> FolderEmbeddings:
    rows, classes = [], []
    for path in paths:
        embedding, probabilities = embedder.embed_audio(_load(path, embedder, sample_rate))
        rows.append(embedding.cpu().double().numpy())
        classes += [] if probabilities is None else [probabilities]
        on_file()
    return FolderEmbeddings(_names(paths, folder), rows, torch.cat(classes).numpy() if classes else None)


# The comparison


def compare_folders(
    generated: str | Path,
    reference: str | Path,
    embedding: str = "aisfx",
    checkpoint: str | Path | None = None,
    captions: str | Path | None = None,
    pca: int = 64,
    skip_bad: bool = False,
    seed: int = 0,
    sample_rate: int | None = None,
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    on_clips: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare a folder of generated sounds with a folder of real ones.

    captions: a CSV file with the columns `file` and `caption`, named like the generated files. pca: Frechet distances
    are between projections onto this many principal components of the reference, at most as many as half of it has; 0:
    no projection. sample_rate: read both folders at this rate (Hz) first, so that a band that one of them lacks does
    not count. skip_bad: leave out unusable files. on_clips(stage, done, all) reports progress. Raises ValueError naming
    all unusable files, or if the folders cannot be compared; FileNotFoundError for a missing folder.

    Notebook: 05
    """
    pca, seed = whole("pca", pca or 0, 0), whole_seed(seed)
    sample_rate = None if sample_rate is None else whole_rate(sample_rate)
    folders = Path(generated), Path(reference)
    (paths, passed), (real_paths, real_passed) = (_sounds(f, captions) for f in folders)
    files = len(paths) + len(real_paths)
    _check_apart(*folders)
    _check_different(paths, real_paths)
    listed = read_captions(captions) if captions else {}
    embedder = open_embedding(embedding, checkpoint, tokenizer, device)

    on_file = _progress(on_clips, "checking", files)
    made, made_side = _check_files(folders[0], paths, embedder, sample_rate, on_file)
    real, real_side = _check_files(folders[1], real_paths, embedder, sample_rate, on_file)
    faults = made_side.skipped + real_side.skipped
    if faults and not skip_bad:
        message = f"{len(faults)} of {files} files cannot be used; --skip-bad (skip_bad=True) leaves them out:"
        raise ValueError("\n  ".join([message, *faults]))
    for side in (made_side, real_side):
        if side.clips < 2:
            raise ValueError(
                f"{side.folder} holds {side.clips} usable sound files, expected 2 or more with one of the endings "
                f"{' '.join(sorted(AUDIO_SUFFIXES))}"
            )
    names = _names(made, folders[0])
    whole_names = [path.relative_to(folders[0]).as_posix() for path in made]
    caption_of, unnamed = captions_of(whole_names, listed)
    captioned = [i for i, name in enumerate(whole_names) if name in caption_of]
    if captions and not captioned:
        first = without_ending(next(iter(listed), "nothing"))
        raise ValueError(f"{captions} names none of the clips in {generated}: {first!r} is no {names[0]!r}")
    text = None
    if embedder.embed_text and captioned:
        text = embedder.embed_text([caption_of[whole_names[i]] for i in captioned])

    on_file = _progress(on_clips, "embedding", len(made) + len(real))
    g = _embed(made, folders[0], embedder, sample_rate, on_file)
    r = _embed(real, folders[1], embedder, sample_rate, on_file)
    rows, dimensions = r.stacked().shape
    kept = min(pca, max(1, rows // 2 - 1), dimensions) if pca else None  # as many as halves have, for the baseline
    on_metric = _progress(on_clips, "computing", len(METRICS))
    scores, left_out = compute_scores(g, r, captioned, text, kept, seed, on_metric)
    metadata = {
        "name": embedding,
        "version": embedder.version,
        "sha256": embedder.sha256,
        "dimensions": dimensions,
        "sample_rate": embedder.sample_rate,
        "read_at": sample_rate or embedder.sample_rate,
        "resampler": RESAMPLER,
        "window_seconds": embedder.seconds,
    }
    notes = _notes(made_side, real_side, metadata, pca, kept, rows, len(made) - len(captioned) if captions else 0)
    more = [f"passed over in {generated}: {passed}"] * bool(passed)
    more += [f"passed over in {reference}: {real_passed}"] * bool(real_passed)
    more += [f"{len(unnamed)} rows of {captions} name no generated clip: {', '.join(unnamed[:3])}"] * bool(unnamed)
    return Comparison(made_side, real_side, metadata, kept, seed, scores, left_out, (*notes, *more))


def _notes(
    generated: Side, reference: Side, embedding: dict[str, Any], pca: int, kept: int | None, rows: int, uncaptioned: int
) -> Iterator[str]:
    """Notes on the limits of a comparison, below its table."""
    half, window = reference.clips // 2, embedding["window_seconds"]
    if kept and kept < pca:
        yield f"of the {pca} requested PCA dimensions, a half of the reference has {kept}"
    if half > 1:
        yield (
            f"same n: the distance of {min(half, generated.clips)} generated clips to {half} real ones, comparable to "
            "the baseline; a Frechet distance falls with more clips, a kernel distance does not"
        )
    highest = [max(side.sample_rates, default=0) for side in (generated, reference)]
    if highest[0] != highest[1] and min(highest) < embedding["read_at"]:
        yield (
            f"the generated files have {highest[0]} Hz and the references {highest[1]} Hz: frequencies that only one "
            f"side can have count as a difference; a sample rate of {min(highest)} would read both alike"
        )
    if window and max(generated.longest, reference.longest) > window:
        yield f"of clips longer than {window} s only the start is used"
    if rows > reference.clips:
        yield "Frechet distances are between all windows, kernel distances between the means of clips"
    if uncaptioned:
        yield f"{uncaptioned} of {generated.clips} generated clips have no caption"


def _progress(on_clips: Callable[[str, int, int], None] | None, stage: str, total: int) -> Callable[[], None]:
    done = count(1)
    return lambda: on_clips and on_clips(stage, next(done), total)
