"""Captioned recordings from a folder, CSV or JSON, and batches that a resumed run can enter at any step."""

import csv
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refined_ldm.atomic import written_whole
from refined_ldm.audio import load_audio, normalize, pad_or_trim
from refined_ldm.published_data import audioldm_entries, wav_and_captions

SAMPLE_RATE = 16_000  # Hz
AUDIO_SUFFIXES = frozenset(".aac .aif .aiff .au .caf .flac .m4a .mp3 .oga .ogg .opus .w64 .wav .wma".split())
FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Recording:
    """One sound file and what is said about it."""

    path: Path
    id: str  # unique in the data set: the path below its folder
    captions: tuple[str, ...]  # one or more
    label: str = ""  # class name, where the data set has classes


class CaptionedAudio(Dataset):
    """Recordings with captions, each `seconds` long and at AudioLDM's level.

    dataset[i] is a dict: "waveform" (N,) float32 with N = round(seconds * 16000), "caption" (the first of
    "captions"), "captions", "id", "label". A longer recording gives its first `seconds`, or with `crop="random"` a
    part chosen by `seed` and id, the same in every epoch; a shorter one is followed by zeros.
    """

    def __init__(self, recordings: list[Recording], seconds: float = 2.56, crop: str = "start", seed: int = 0):
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        if crop not in ("start", "random"):
            raise ValueError(f'crop must be "start" or "random", got {crop!r}')
        if not recordings:
            raise ValueError("a data set needs at least one recording, got none")
        self.recordings = recordings
        self.samples = round(seconds * SAMPLE_RATE)
        self.crop = crop
        self.seed = seed

    @classmethod
    def from_folder(
        cls, folder: str | Path, seconds: float = 2.56, crop: str = "start", seed: int = 0, skip_bad: bool = False
    ) -> "CaptionedAudio":
        """Every sound file below `folder`, captioned by `captions.csv` in it if there is one (see `from_csv`).

        Otherwise each line of `rain.txt` captions `rain.wav`, and a file with no such text is captioned by its name:
        `dog_barks.wav` is "dog barks". With `skip_bad` every file is decoded once and faulty ones are left out.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        if (folder / "captions.csv").is_file():
            return cls.from_csv(folder / "captions.csv", seconds, crop=crop, seed=seed, skip_bad=skip_bad)

        recordings, faults = [], []
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith("."):
                continue
            try:
                if skip_bad:
                    load_audio(path)
                recordings.append(Recording(path, path.relative_to(folder).as_posix(), _captions_beside(path)))
            except ValueError as error:
                faults.append(str(error))
        _report(faults, folder, skip_bad)
        if not recordings:
            raise ValueError(f"{folder}: no usable sound file ({' '.join(sorted(AUDIO_SUFFIXES))}) in it or below it")
        return cls(recordings, seconds, crop, seed)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        seconds: float = 2.56,
        caption: str = "caption",
        file: str = "file",
        label: str = "label",
        crop: str = "start",
        seed: int = 0,
        skip_bad: bool = False,
    ) -> "CaptionedAudio":
        """Recordings listed in a CSV file with a header: columns `file`, `caption` and, if it has one, `label`.

        Files are named relative to the CSV file and lie in its folder or below it. Rows that name the same file add
        captions to it. Faulty rows are a ValueError that lists them by line number; with `skip_bad` every file is
        decoded once, and faulty rows are left out with a warning.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such CSV file")
        found: dict[str, Recording] = {}  # by id
        faults = []
        for number, row in _rows(path, needed=(file, caption)):
            try:
                name, text = _field(row, file), _field(row, caption)
                sound = _inside(path.parent, name)
                id = sound.relative_to(path.parent).as_posix()
                if skip_bad and id not in found:
                    load_audio(sound)
                known = found[id].captions if id in found else ()
                captions = known if text in known else (*known, text)
                found[id] = Recording(sound, id, captions, (row.get(label) or "").strip())
            except (ValueError, FileNotFoundError) as error:
                faults.append(f"line {number}: {error}")
        _report(faults, path, skip_bad)
        if not found:
            raise ValueError(f"{path}: no usable row")
        return cls(list(found.values()), seconds, crop, seed)

    @classmethod
    def from_audioldm(
        cls,
        path: str | Path,
        split: str = "train",
        seconds: float = 2.56,
        names: tuple[str, ...] = (),
        crop: str = "start",
        seed: int = 0,
        skip_bad: bool = False,
    ) -> "CaptionedAudio":
        """One split of the data sets that AudioLDM's `dataset_root.json` lists: those in `names`, or all of them.

        Its paths start where AudioLDM is run: at the folder of the file, one of the three above it, or the working
        directory, whichever has them. An entry is a "wav" below its set's folder, with a caption under every key that
        speaks of one; entries of one file add up. Faulty entries are reported, or left out, as in `from_csv`.
        """
        found: dict[str, Recording] = {}  # by id
        faults = []
        for where, name, folder, entry in audioldm_entries(path, split, names):
            try:
                wav, texts = wav_and_captions(entry)
                sound = _inside(folder, wav)
                id = f"{name}/{sound.relative_to(folder).as_posix()}"
                if skip_bad and id not in found:
                    load_audio(sound)
                known = found[id].captions if id in found else ()
                captions = tuple(dict.fromkeys((*known, *texts)))
                found[id] = Recording(sound, id, captions, str(entry.get("labels") or ""))
            except (ValueError, FileNotFoundError) as error:
                faults.append(f"{where}: {error}")
        _report(faults, Path(path), skip_bad)
        if not found:
            raise ValueError(f"{path}: no usable entry")
        return cls(list(found.values()), seconds, crop, seed)

    def __len__(self) -> int:
        return len(self.recordings)

    def fingerprint(self) -> str:
        """Name what the clips are made of: captions, crops, and every file by its size and time of change."""
        made_of = hashlib.sha256(repr((self.samples, self.crop, self.seed)).encode())
        for recording in self.recordings:
            stat = recording.path.stat()
            made_of.update(repr((recording.id, recording.captions, recording.label, stat.st_size, stat.st_mtime_ns))
                           .encode())  # fmt: skip
        return made_of.hexdigest()[:32]

    def __getitem__(self, index: int) -> dict:
        recording = self.recordings[index]
        waveform = load_audio(recording.path, SAMPLE_RATE)
        spare = len(waveform) - self.samples
        if self.crop == "random" and spare > 0:
            start = np.random.default_rng((self.seed, zlib.crc32(recording.id.encode()))).integers(spare + 1)
            waveform = waveform[start:]
        return {  # AudioLDM's order: cut, set the level, then pad
            "waveform": pad_or_trim(normalize(waveform[: self.samples]), self.samples),
            "caption": recording.captions[0],
            "captions": recording.captions,
            "id": recording.id,
            "label": recording.label,
        }


def collate(items: list[dict]) -> dict:
    """A batch: tensors are stacked ("waveform" (B, N)), every other key that all items have is a list of B values."""
    keys = [key for key in items[0] if all(key in item for item in items)]
    batch = {key: [item[key] for item in items] for key in keys}
    return {k: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for k, v in batch.items()}


class StepSampler:
    """Endless batches of indices; the k-th depends only on (seed, k), so a run resumes at `start_step`.

    Shuffled epochs follow one another without a gap, each holding every index once. A batch may span two epochs, or
    many when the data set is smaller than a batch.
    """

    drop_last = True  # every batch is full; Accelerate asks

    def __init__(self, size: int, batch_size: int, seed: int = 0, start_step: int = 0):
        if size < 1 or batch_size < 1 or start_step < 0:
            raise ValueError(
                f"size and batch_size must be >= 1 and start_step >= 0, got {size}, {batch_size}, {start_step}"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start_step * self.batch_size, self.size)
        waiting = self._shuffled(epoch)[position:]
        while True:
            while len(waiting) < self.batch_size:
                epoch += 1
                waiting = waiting + self._shuffled(epoch)
            yield waiting[: self.batch_size]
            waiting = waiting[self.batch_size :]

    def _shuffled(self, epoch: int) -> list[int]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size).tolist()


def loader(dataset: Dataset, batch_size: int, seed: int = 0, start_step: int = 0, num_workers: int = 0) -> DataLoader:
    """Batches of `dataset` without end, the same ones in the same order from whichever step they start."""
    sampler = StepSampler(len(dataset), batch_size, seed, start_step)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)


class Cached(Dataset):
    """A data set computed once and kept in a folder: arrays as memory-mapped .npy files, the rest as JSON.

    cached[i] is a dict with a float32 tensor for every array and the item's other values.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.made_of = json.loads((folder / "made_of.json").read_text())
        self.rest = json.loads((folder / "items.json").read_text())
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, index: int) -> dict:
        def floats(row):
            return row / np.float32(32767) if row.dtype == np.int16 else row.astype(np.float32)

        return {**self.rest[index], **{k: torch.from_numpy(floats(v[index])) for k, v in self.arrays.items()}}


def _cache(folder: Path, fingerprint: dict, count: int, batches: Iterator[tuple[dict, list[dict]]]) -> Cached:
    """Write (arrays, other values) batch by batch, whole or not at all; an equal earlier cache is taken as it is."""
    if kept := _kept(folder, fingerprint):
        return kept
    with written_whole(folder) as temporary:
        temporary.mkdir()
        items = []
        with ExitStack() as stack:
            files = {}
            for rows, rest in batches:
                for key, block in rows.items():
                    if key not in files:
                        files[key] = stack.enter_context(open(temporary / f"{key}.npy", "wb"))
                        _write_npy_header(files[key], block.dtype, (count, *block.shape[1:]))
                    files[key].write(np.ascontiguousarray(block))  # a memory map would crash when the disk is full
                items += rest
        (temporary / "items.json").write_text(json.dumps(items))
        (temporary / "made_of.json").write_text(json.dumps(fingerprint))
    return Cached(folder)


def _kept(folder, fingerprint):
    """The cache in a folder if there is one, whole and made of the same, else None."""
    try:
        cached = Cached(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as fault:
        warnings.warn(f"{folder} is damaged ({fault}): it is made again", stacklevel=4)
        return None
    return cached if cached.made_of == fingerprint else None


def _write_npy_header(file, dtype, shape):
    told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, told)


def _batches(dataset, batch_size, on_clips):
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        yield items
        if on_clips:
            on_clips(start + len(items), len(dataset))


def cache_clips(folder: str | Path, dataset: Dataset, fingerprint: dict, on_clips=None) -> Cached:
    """Render or decode every clip once, into `folder` as 16-bit samples. on_clips(done, all) reports progress.

    `fingerprint` tells what the clips are made of: a folder with the same one is taken as it is.
    """

    def rows():
        for items in _batches(dataset, 64, on_clips):
            waveforms = np.stack([item["waveform"].numpy() for item in items])
            rest = [{k: item[k] for k in ("caption", "captions", "id", "kind", "labels", "label") if k in item}
                    for item in items]  # fmt: skip
            yield {"waveform": np.round(waveforms * 32767).astype(np.int16)}, rest

    return _cache(Path(folder), fingerprint, len(dataset), rows())


def encoded_at_once(samples: int) -> int:
    """How many clips go through a VAE together: 32 of 2.56 s, 8 of 10.24 s, which takes 2 GB at the published size."""
    return max(1, 32 * 40_960 // samples)


@torch.no_grad()
def cache_latents(folder: str | Path, dataset: Dataset, encode, embed, fingerprint: dict, on_clips=None) -> Cached:
    """Encode every clip and its captions once: "latent" (C, T / 4, F / 4), unscaled, and "embeddings" (K, D), float16.

    encode: waveform (B, N) -> latent (B, C, T / 4, F / 4); embed: list of B captions -> (B, D). Clips with fewer than K
    captions repeat theirs. Training then skips VAE and conditioner: 32 KiB are read for each clip of 5 s.
    """
    most = max(len(dataset[i]["captions"]) for i in range(min(len(dataset), 256)))

    def rows():
        for items in _batches(dataset, encoded_at_once(len(dataset[0]["waveform"])), on_clips):
            latents = encode(torch.stack([item["waveform"] for item in items]))
            captions = [item["captions"][k % len(item["captions"])] for item in items for k in range(most)]
            embeddings = embed(captions).unflatten(0, (len(items), most))
            rest = [{"id": item["id"], "captions": item["captions"]} for item in items]
            yield {k: v.cpu().numpy().astype(np.float16) for k, v in
                   {"latent": latents, "embeddings": embeddings}.items()}, rest  # fmt: skip

    return _cache(Path(folder), fingerprint, len(dataset), rows())


def _captions_beside(path: Path) -> tuple[str, ...]:
    """The lines of the text file with the sound file's name, or that name in words."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return (" ".join(path.stem.replace("_", " ").replace("-", " ").split()) or path.stem,)
    try:
        lines = text.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: not a text in UTF-8 ({error})") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ValueError(f"{text}: expected a caption on each line, the file has no text")
    return captions


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV file (UTF-8, comma-separated, header with the columns `needed`), each with its line number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            missing = [column for column in needed if column not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}: expected a column {missing[0]!r}, its header is {rows.fieldnames}")
            for row in rows:
                yield rows.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error


def _field(row: dict, column: str) -> str:
    value = (row[column] or "").strip()
    if not value:
        raise ValueError(f"the column {column!r} is empty")
    if None in row:
        raise ValueError("more values than columns; put a caption that contains a comma in quotes")
    return value


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; names that lead out of it are refused."""
    relative = os.path.normpath(name)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{name!r} leads out of {folder}")
    if not (folder / relative).is_file():
        raise FileNotFoundError(f"{folder / relative}: no such sound file")
    return folder / relative


def _report(faults: list[str], source: Path, skip_bad: bool) -> None:
    if not faults:
        return
    shown = faults[:FAULTS_SHOWN] + [f"and {len(faults) - FAULTS_SHOWN} more"] * (len(faults) > FAULTS_SHOWN)
    message = f"{source}: {len(faults)} faulty entries\n  " + "\n  ".join(shown)
    if not skip_bad:
        raise ValueError(f"{message}\nMend them, or leave them out with skip_bad=True.")
    warnings.warn(f"{message}\nThey are left out.", stacklevel=3)
