"""Captioned recordings from every kind of list."""

import hashlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from refined_ldm.audio import audio_seconds, load_audio, normalize, pad_or_trim
from refined_ldm.base.integers import number, whole, whole_seed
from refined_ldm.data.audioldm_lists import audioldm_entries, wav_and_captions
from refined_ldm.data.known_sets import KNOWN, TEMPLATE, known_entries, wanted_splits
from refined_ldm.data.listing import (
    AUDIO_SUFFIXES,
    TEXT_SUFFIXES,
    captions_table,
    file_inside,
    find_files,
    is_sound,
    log_once,
    log_shared_texts,
    pair_texts,
    single_text,
    unused_files,
)
from refined_ldm.data.parquet import Cell, find_parquet, parquet_sounds
from refined_ldm.data.shards import Member, find_shards, shard_sounds
from refined_ldm.data.tables import (
    caption_lines,
    captions_in,
    clean_caption,
    field,
    json_captions,
    read_rows,
    span_in,
    text_in,
)

SAMPLE_RATE = 16_000  # Hz
FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Recording:
    """One sound file with its captions."""

    path: Path | Member | Cell  # a file, or a part of one
    id: str  # unique in the data set: the path below its folder
    captions: tuple[str, ...]  # one or more
    label: str = ""  # class name, where the data set has classes
    where: str = ""  # it is listed: "captions.csv, line 7"
    split: str = ""  # or fold, where the data set has any
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: the end of the file


class CaptionedAudio(Dataset):
    """Recordings with captions, each `seconds` long and at AudioLDM's level.

    dataset[i] is a dict: "waveform" (N,) float32 with N = round(seconds * 16000), "caption" (the first of
    "captions"), "captions", "id", "label". A longer recording gives its first `seconds`, or with `crop="random"` a
    part chosen by `seed` and id, the same in every epoch; no more of it is read. A shorter one is followed by zeros.

    The constructors raise a ValueError that names all faulty entries. With `skip_bad` they leave these out, warn, and
    list them in `left_out`; every recording is then decoded once to find the faulty ones.
    """

    left_out: tuple[str, ...] = ()  # faults

    def __init__(self, recordings: list[Recording], seconds: float = 2.56, crop: str = "start", seed: int = 0):
        seconds = number("seconds", seconds)
        if not 0 < seconds < 86_400:
            raise ValueError(f"seconds must be positive and below a day, got {seconds}")
        if crop not in ("start", "random"):
            raise ValueError(f'crop must be "start" or "random", got {crop!r}')
        if not recordings:
            raise ValueError("a data set needs at least one recording, got none")
        self.recordings = recordings
        self.samples = round(seconds * SAMPLE_RATE)
        self.crop = crop
        self.seed = whole_seed(seed)

    @classmethod
    def from_folder(
        cls, folder: str | Path, seconds: float = 2.56, crop: str = "start", seed: int = 0, skip_bad: bool = False
    ) -> "CaptionedAudio":
        """Every sound file below `folder`, captioned by `captions.csv` in it if there is one (see `from_csv`).

        Otherwise each line of `rain.txt` or `rain.wav.txt` captions `rain.wav`, or the "caption", "captions" or "text"
        in `rain.json`, in upper or lower case; the text with its whole name goes before the others. A file with no such
        text is captioned by its name: `dog_barks.wav` is "dog barks". Links to folders are followed. Unused
        files, and texts that caption several sounds, are logged in one line each.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        files, repeated = find_files(folder)
        sounds = {path.relative_to(folder).as_posix(): path for path in files if is_sound(path)}
        if table := captions_table(folder):
            dataset = cls.from_csv(table, seconds, crop=crop, seed=seed, skip_bad=skip_bad)
            listed = {os.path.normpath((row["file"] or "").strip()) for _, row in read_rows(table, ("file",))}
            if unlisted := sounds.keys() - listed:
                log_once(f"{folder}: {len(unlisted)} of {len(sounds)} sounds are not in {table.name}, and not used")
            return dataset
        if not sounds:
            raise ValueError(f"{folder}: no usable sound file ({' '.join(sorted(AUDIO_SUFFIXES))}) in it or below it")
        others = [path.relative_to(folder).as_posix() for path in files if path not in set(sounds.values())]
        texts = [name for name in others if Path(name).suffix.lower() in TEXT_SUFFIXES]
        pairs, left = pair_texts(list(sounds), texts)
        by_name = []

        def recording(id, path):
            captions, label = (), ""
            if id in pairs:
                text = folder / single_text(id, pairs[id])
                if text.suffix.lower() == ".txt":
                    captions = caption_lines(text.read_bytes(), text)
                else:
                    captions, label = json_captions(text.read_bytes(), text, needed=False)
            if not captions:
                by_name.append(id)
                captions = (_name_in_words(path),)
            return Recording(path, id, captions, label)

        entries = (("", lambda id=id, path=path: recording(id, path)) for id, path in sounds.items())
        dataset = cls._from_entries(folder, entries, seconds, crop, seed, skip_bad)
        unused = set(others) - set(texts) | set(left)
        if skipped := unused_files(unused, folders_that_a_link_leads_to_again=repeated):
            log_once(f"{folder}: {len(sounds)} sounds; passed over: {skipped}")
        log_shared_texts(folder, pairs)
        if pairs and by_name:
            log_once(
                f"{folder}: {len(by_name)} of {len(sounds)} sounds have no text beside them and are captioned by "
                f"their names: {', '.join(by_name[:3])}{' …' * (len(by_name) > 3)}"
            )
        return dataset

    @classmethod
    def open(
        cls,
        name: str,
        root: str | Path,
        split: str = "",
        seconds: float = 2.56,
        template: str = TEMPLATE,
        caption: str = "",
        crop: str = "start",
        seed: int = 0,
        skip_bad: bool = False,
    ) -> "CaptionedAudio":
        """A known data set (a name in `known_sets.KNOWN`, as "clotho") in the layout it is published in, below `root`.

        split: one of its splits or folds, or several with commas; "train": those for training; "": all. template: the
        caption from names of classes. caption: the column of captions, in place of the data set's own. Clips that
        every copy of a data set lacks some of (AudioCaps) are no faults; they are listed in `left_out` and counted in
        one logged line. Raises ValueError for an unknown name or split.
        """
        if name not in KNOWN:
            raise ValueError(f"no known data set {name!r}, only {', '.join(KNOWN)}")
        missing = []
        listed = known_entries(name, Path(root), split, missing, template, caption)

        entries = ((where, lambda entry=entry: Recording(*entry())) for where, entry in listed)
        try:
            dataset = cls._from_entries(root, entries, seconds, crop, seed, skip_bad)
        except ValueError as error:
            if len(missing) > 1 and "no usable entry" in str(error):
                raise ValueError(f"{root}: none of {len(missing)} listed sounds is there; {missing[0]}") from error
            raise
        if missing:
            log_once(f"{root}: {len(missing)} rows of {KNOWN[name].title} are left out, their sounds are not on disk")
        dataset.left_out += tuple(missing)
        return dataset

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
        """Recordings listed in a CSV file with a header or in JSON lines (.jsonl): columns `file`, `caption` and, if it
        has them, `label`, `start` and `end`, which are seconds and choose a part of the file.

        Files are named relative to the table and lie in its folder or below it. Rows that name the same file, or the
        same part of it, add captions. A caption in JSON lines may be a list of captions.
        """
        path = Path(path)

        def recording(number, row):
            name, captions, (start, end) = field(row, file), captions_in(row, caption), span_in(row)
            sound = file_inside(path.parent, name)
            id = sound.relative_to(path.parent).as_posix()
            if start or end is not None:
                id += f"@{start:g}-{'' if end is None else f'{end:g}'}"
            return Recording(sound, id, captions, text_in(row, label), f"{path.name}, line {number}", "", start, end)

        entries = ((f"line {n}", lambda n=n, row=row: recording(n, row)) for n, row in read_rows(path, (file, caption)))
        return cls._from_entries(path, entries, seconds, crop, seed, skip_bad)

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
        directory, whichever has them. An entry is a "wav" below its set's folder, with a caption under every key
        with "caption" in it; entries of one file add up.
        """

        def recording(where, name, folder, entry):
            wav, texts = wav_and_captions(entry)
            sound = file_inside(folder, wav)
            id = f"{name}/{sound.relative_to(folder).as_posix()}"
            return Recording(sound, id, tuple(map(clean_caption, texts)), str(entry.get("labels") or ""), where)

        listed = audioldm_entries(path, split, names)
        entries = ((where, lambda w=where, rest=rest: recording(w, *rest)) for where, *rest in listed)
        return cls._from_entries(path, entries, seconds, crop, seed, skip_bad)

    @classmethod
    def from_shards(
        cls, where: str | Path, seconds: float = 2.56, crop: str = "start", seed: int = 0, skip_bad: bool = False
    ) -> "CaptionedAudio":
        """WebDataset's shards, a .tar file, a folder of them or a pattern (`set/*.tar`), read without being unpacked.

        `a/rain.wav` in a shard is captioned by the lines of `a/rain.txt`, else by the "caption", "captions" or "text"
        in `a/rain.json` (`shards` says which text is whose). Unused files are logged in one line.
        """
        shards = find_shards(where)
        if not shards:
            raise FileNotFoundError(f"{where}: no shard, which is a .tar file, a folder of them, or a pattern")

        passed = []
        entries = (
            (at, lambda at=at, sound=sound: Recording(*sound(), at)) for at, sound in shard_sounds(shards, passed)
        )
        dataset = cls._from_entries(where, entries, seconds, crop, seed, skip_bad)
        if Path(where).is_dir():
            passed += [str(path) for path in find_files(where)[0] if path not in shards]
        if skipped := unused_files(passed):
            log_once(f"{where}: {len(dataset)} sounds in {len(shards)} shards; passed over: {skipped}")
        return dataset

    @classmethod
    def from_parquet(
        cls,
        where: str | Path,
        split: str = "",
        seconds: float = 2.56,
        audio: str = "",
        caption: str = "",
        crop: str = "start",
        seed: int = 0,
        skip_bad: bool = False,
    ) -> "CaptionedAudio":
        """Sounds in a Parquet file, or in those below a folder, as Hugging Face's `datasets` writes them.

        split: of files named train-00000-of-00002.parquet; "": all. audio, caption: the columns (by default "audio",
        and the first of "caption", "captions", "text" and "transcription"). Needs pyarrow; ValueError without it.
        """
        files = find_parquet(where)
        if not files:
            raise FileNotFoundError(f"{where}: no .parquet file")
        sounds = parquet_sounds(files, wanted_splits(split, ("train",)), audio, caption)
        entries = ((at, lambda entry=entry: Recording(*entry())) for at, entry in sounds)
        return cls._from_entries(where, entries, seconds, crop, seed, skip_bad)

    @classmethod
    def _from_entries(cls, source, entries: Iterator[tuple[str, Callable]], seconds, crop, seed, skip_bad):
        """Of pairs (where it is listed, function that gives a Recording); captions of one recording add up."""
        found: dict[str, Recording] = {}  # by id
        faults = []
        for where, recording in entries:
            try:
                new = recording()
                known = found.get(new.id, new)
                found[new.id] = replace(known, captions=tuple(dict.fromkeys(known.captions + new.captions)))
            except (ValueError, OSError) as error:
                faults.append(f"{where}: {error}" if where else str(error))
        if skip_bad and found:
            whole = cls(list(found.values()), seconds, crop, seed)
            for index, recording in enumerate(whole.recordings):
                try:
                    whole[index]
                except (ValueError, OSError) as error:
                    faults.append(str(error))
                    del found[recording.id]
        _report(faults, source, skip_bad)
        if not found:
            raise ValueError(f"{source}: no usable entry")
        dataset = cls(list(found.values()), seconds, crop, seed)
        dataset.left_out = tuple(faults)
        return dataset

    def __len__(self) -> int:
        return len(self.recordings)

    def fingerprint(self) -> str:
        """A hash of what the clips are made of: captions, crops, and every file's size and time of change."""
        made_of = hashlib.sha256(repr((self.samples, self.crop, self.seed)).encode())
        for recording in self.recordings:
            stat = recording.path.stat()
            made_of.update(
                repr((recording.id, recording.captions, recording.label, stat.st_size, stat.st_mtime_ns)).encode()
            )  # parts of a file differ in their id
        return made_of.hexdigest()[:32]

    def __getitem__(self, index: int) -> dict:
        recording = self.recordings[whole("index", index)]
        try:
            waveform = load_audio(recording.path, SAMPLE_RATE, *self.part(recording))
        except (ValueError, OSError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{recording.where}: {error}" if recording.where else error) from error
        return {  # AudioLDM's order: cut, set the level, then pad
            "waveform": pad_or_trim(normalize(waveform), self.samples),
            "caption": recording.captions[0],
            "captions": recording.captions,
            "id": recording.id,
            "label": recording.label,
        }

    def part(self, recording: Recording) -> tuple[float, float]:
        """The length and the start of a recording's crop, in seconds."""
        start, seconds = recording.start, self.samples / SAMPLE_RATE
        if recording.end is not None:
            seconds = min(seconds, recording.end - start)
        if self.crop == "start":
            return seconds, start
        end = audio_seconds(recording.path) if recording.end is None else recording.end
        spare = round((end - start) * SAMPLE_RATE) - self.samples
        source = np.random.default_rng((self.seed, zlib.crc32(recording.id.encode(errors="backslashreplace"))))
        return seconds, start + source.integers(max(0, spare) + 1) / SAMPLE_RATE


def _name_in_words(path: Path) -> str:
    """The name of a file as a caption: "dog barks" of dog_barks.wav."""
    return clean_caption(" ".join(path.stem.replace("_", " ").replace("-", " ").split()) or path.stem)


def _report(faults: list[str], source: str | Path, skip_bad: bool) -> None:
    if not faults:
        return
    shown = faults[:FAULTS_SHOWN] + [f"and {len(faults) - FAULTS_SHOWN} more"] * (len(faults) > FAULTS_SHOWN)
    message = f"{source}: {len(faults)} faulty entries\n  " + "\n  ".join(shown)
    if not skip_bad:
        raise ValueError(f"{message}\nCorrect them, or leave them out with --skip-bad (skip_bad=True).")
    warnings.warn(f"{message}\nThey are left out.", stacklevel=4)
