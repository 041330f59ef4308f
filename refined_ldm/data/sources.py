"""Open what `--data` names: a known data set, a table, a folder, shards, Parquet files or AudioLDM's lists."""

from pathlib import Path

from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.data.known_sets import KNOWN, detect_known_set, named_set
from refined_ldm.data.listing import captions_table, log_once
from refined_ldm.data.parquet import SUFFIX, find_parquet
from refined_ldm.data.shards import find_shards


def is_there(data: str) -> bool:
    """Whether there is anything at a path, a pattern of shards, or the folder of "clotho:ROOT"."""
    root = named_set(data)[1]
    return Path(root).exists() or bool(find_shards(root))


def open_recordings(
    data: str | Path,
    split: str = "",
    seconds: float = 2.56,
    names: tuple[str, ...] = (),
    file: str = "",
    caption: str = "",
    skip_bad: bool = False,
) -> CaptionedAudio:
    """Open recordings by what is there; for a folder whose layout is recognised, log in one line what it is taken for.

    split: of a known data set, Parquet files or AudioLDM's lists; "" is all, in AudioLDM's lists "train". names: data
    sets in AudioLDM's dataset_root.json. file, caption: columns of tables and Parquet files, where they have other
    names. Raises ValueError or FileNotFoundError for unusable recordings without `skip_bad`.
    """
    name, root = named_set(str(data))
    path = Path(root)
    if not is_there(root):
        raise FileNotFoundError(f"no recordings at {root}: give a table, a folder, a known data set or shards")
    if name:
        return CaptionedAudio.open(name, path, split, seconds, caption=caption, skip_bad=skip_bad)
    if path.suffix == ".json":
        return CaptionedAudio.from_audioldm(path, split or "train", seconds, names, skip_bad=skip_bad)
    table = captions_table(path) if path.is_dir() else None  # archives may lie beside their extracted files
    if path.is_dir() and not table:
        name, lists = detect_known_set(path)
        if name:
            dataset = CaptionedAudio.open(name, path, split, seconds, caption=caption, skip_bad=skip_bad)
            captions = sum(len(recording.captions) for recording in dataset.recordings)
            log_once(
                f"{path}: taken for {KNOWN[name].title} ({', '.join(file.name for file in lists)}): "
                f"{len(dataset)} clips, {captions} captions"
            )
            return dataset
        if find_parquet(path):
            return CaptionedAudio.from_parquet(path, split, seconds, file, caption, skip_bad=skip_bad)
    if path.suffix.lower() == SUFFIX:
        return CaptionedAudio.from_parquet(path, split, seconds, file, caption, skip_bad=skip_bad)
    if split not in ("", "train"):
        raise ValueError(f"{path} has no splits, which tables, shards and plain folders have none of: got {split!r}")
    if find_shards(path) and not table:
        return CaptionedAudio.from_shards(path, seconds, skip_bad=skip_bad)
    if path.is_dir() and not (table and (file or caption)):
        return CaptionedAudio.from_folder(path, seconds, skip_bad=skip_bad)
    columns = {"file": file or "file", "caption": caption or "caption"}
    return CaptionedAudio.from_csv(table or path, seconds, **columns, skip_bad=skip_bad)
