"""Caches in folders: rendered or decoded clips, latents and caption embeddings, each computed once."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refined_ldm.base.files import atomic_write

HOLDS = r"items\.json|made_of\.json|[\w-]+\.npy"  # the files of a cache
CACHED_KEYS = ("caption", "captions", "id", "kind", "events", "labels", "label")  # of a clip, beside its waveform


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


def cache_batches(folder: Path, fingerprint: dict, count: int, batches: Iterator[tuple[dict, list[dict]]]) -> Cached:
    """Write (arrays, other values) batch by batch, whole or not at all; an equal earlier cache is taken as it is."""
    if kept := _kept(folder, fingerprint):
        return kept
    with atomic_write(folder, HOLDS) as temporary:
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


def of_before(folder: Path) -> dict:
    """Return the record of what a cached folder was made of, {} for no cache or one that cannot be read."""
    try:
        return json.loads((folder / "made_of.json").read_text())
    except (OSError, ValueError):
        return {}


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
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(dataset, batch_size, on_clips, workers=0):
    """Lists of items in order; `workers`: processes that make them."""
    done, context = 0, "fork" if workers else None
    batches = DataLoader(
        _WithErrors(dataset),
        batch_size,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=context,
        generator=torch.Generator(),
    )
    for items in batches:
        for item in items:
            if isinstance(item, Exception):
                raise item
        yield items
        done += len(items)
        if on_clips:
            on_clips(done, len(dataset))


class _WithErrors(Dataset):
    """A data set that returns its errors as items, so that worker processes pass them on unchanged."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except (ValueError, OSError) as fault:
            return fault


def render_workers(clips: int) -> int:
    """Number of processes that render `clips`: one per core on Linux for at least 256 clips, else 0."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" and clips >= 256 else 0


def cache_clips(
    folder: str | Path, dataset: Dataset, fingerprint: dict, on_clips: Callable[[int, int], None] | None = None
) -> Cached:
    """Render or decode every clip once, into `folder` as 16-bit samples. on_clips(done, all) reports progress.

    fingerprint: what the clips are made of; a folder with an equal one is used as it is. Raises OSError if it cannot be
    written, and what the data set raises.
    """

    def rows():
        for items in _batches(dataset, 64, on_clips, render_workers(len(dataset))):
            waveforms = np.stack([item["waveform"].numpy() for item in items])
            rest = [{k: _plain(item[k]) for k in CACHED_KEYS if k in item} for item in items]
            yield {"waveform": np.round(waveforms * 32767).astype(np.int16)}, rest

    return cache_batches(Path(folder), fingerprint, len(dataset), rows())


def _plain(value):
    """Events become dicts, as JSON knows no dataclasses."""
    return (
        [asdict(event) for event in value] if isinstance(value, tuple) and value and is_dataclass(value[0]) else value
    )


def encoded_at_once(samples: int) -> int:
    """Number of clips that a VAE encodes at once: 32 of 2.56 s, 8 of 10.24 s (2 GB at the published size)."""
    return max(1, 32 * 40_960 // samples)


@torch.no_grad()
def cache_latents(
    folder: str | Path,
    dataset: Dataset,
    encode: Callable[[torch.Tensor], torch.Tensor] | None,
    embed: Callable[[list[str]], torch.Tensor] | None,
    fingerprint: dict,
    on_clips: Callable[[int, int], None] | None = None,
    embed_audio: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Cached:
    """Encode every clip and its captions once, in float16: "latent" (C, T / 4, F / 4), unscaled; "embeddings" (K, D).

    encode: waveform (B, N) -> latent (B, C, T / 4, F / 4); embed: list of B captions -> (B, D); embed_audio: waveform
    (B, N) -> "audio_embedding" (B, D); None omits them. Clips with fewer than K captions repeat theirs. Training then
    skips VAE and conditioner: they read 32 KiB for each clip of 5 s.
    """
    first = [dataset[i] for i in range(min(len(dataset), 256))]
    most = max(len(item["captions"]) for item in first)
    together = encoded_at_once(len(first[0]["waveform"])) if encode else 64

    def rows():
        for items in _batches(dataset, together, on_clips):
            arrays = {}
            if encode:
                arrays["latent"] = encode(torch.stack([item["waveform"] for item in items]))
            if embed_audio:
                arrays["audio_embedding"] = embed_audio(torch.stack([item["waveform"] for item in items]))
            if embed:
                captions = [item["captions"][k % len(item["captions"])] for item in items for k in range(most)]
                arrays["embeddings"] = embed(captions).unflatten(0, (len(items), most))
            rest = [{"id": item["id"], "captions": item["captions"]} for item in items]
            yield {k: v.cpu().numpy().astype(np.float16) for k, v in arrays.items()}, rest

    return cache_batches(Path(folder), fingerprint, len(dataset), rows())
