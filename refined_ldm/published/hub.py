"""Published weights, downloaded from their authors: name, size, licence and local path.

Downloads go through `huggingface_hub`, which resumes a broken one and puts a file into its cache whole or not at all.
For files that are elsewhere, the error names their page.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refined_ldm.base.files import sha256


@dataclass(frozen=True)
class Published:
    """One published file, or the folder of a pipeline."""

    gigabytes: float
    licence: str
    taken_by: str  # the call that reads it
    repository: str = ""  # on the Hugging Face hub
    folder: bool = False  # the whole repository is wanted
    page: str = ""  # elsewhere: to be downloaded by hand


def _audioldm(gigabytes, **where):
    return Published(gigabytes, "CC BY-NC 4.0", "RefinedAudioLDM.from_audioldm(PATH)", **where)


def _zenodo(gigabytes, file):
    return _audioldm(gigabytes, page=f"https://zenodo.org/records/{file}")


def _training_archive(taken_by):  # one archive for all of its parts
    return Published(7.8, "CC BY-NC 4.0", taken_by, page="https://zenodo.org/records/14342967 (in checkpoints.tar)")


PUBLISHED = {
    "CLAP_weights_2023.pth": Published(0.7, "MS-PL", 'Clap.load("ms-clap-2023", checkpoint=PATH)', "microsoft/msclap"),
    "630k-audioset-best.pt": Published(1.9, "CC0", 'Clap.load("laion-clap", checkpoint=PATH)', "lukewys/laion_clap"),
    "music_speech_audioset_epoch_15_esc_89.98.pt": Published(
        2.4, "CC0", 'Clap.load("laion-clap", checkpoint=PATH)', "lukewys/laion_clap"
    ),
    # diffusers' copies, without the audio tower of their conditioner
    "audioldm-s-full": _audioldm(1.7, repository="cvssp/audioldm", folder=True),
    "audioldm-s-full-v2": _audioldm(1.7, repository="cvssp/audioldm-s-full-v2", folder=True),
    "audioldm-m-full": _audioldm(2.6, repository="cvssp/audioldm-m-full", folder=True),
    "audioldm-l-full": _audioldm(3.9, repository="cvssp/audioldm-l-full", folder=True),
    # AudioLDM's own checkpoints, running average and audio tower included
    "audioldm-s-full.ckpt": _zenodo(2.6, "7600541/files/audioldm-s-full"),
    "audioldm-s-full-v2.ckpt": _zenodo(2.6, "7698295/files/audioldm-full-s-v2.ckpt"),
    "audioldm-m-full.ckpt": _zenodo(4.6, "7813012/files/audioldm-m-full.ckpt"),
    "audioldm-l-full.ckpt": _zenodo(7.0, "7698295/files/audioldm-full-l.ckpt"),
    "hifigan_16k_64bins.ckpt": _training_archive("`refined-ldm convert PATH hifigan.safetensors`"),
    "vae_mel_16k_64bins.ckpt": _training_archive("`refined-ldm convert PATH vae.safetensors`"),
}
CONDITIONERS = {"ms-clap-2023": "CLAP_weights_2023.pth", "laion-clap": "630k-audioset-best.pt"}


def fetch(name: str, on_message: Callable[[str], None] | None = None) -> Path:
    """A published file (a name in PUBLISHED) -> its Path in the hub's cache, downloaded if it is not there yet.

    Repository, size, licence, sha256 and destination go to `on_message` first (None: to stderr). A download is compared
    with the hub's sha256. Raises FileNotFoundError without a network, or for a file that must be downloaded
    by hand, saying where and for which call; ValueError for an unknown name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"nothing published is called {name!r}: there are {', '.join(PUBLISHED)}")
    if not PUBLISHED[name].repository:
        raise FileNotFoundError(how_to_get(name))
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # HTTPError: of whichever client it uses

    try:
        fetched = _fetch_folder if PUBLISHED[name].folder else _fetch_file
        return fetched(name, PUBLISHED[name].repository, on_message or (lambda line: print(line, file=sys.stderr)))
    except (OSError, HTTPError) as fault:
        offline = isinstance(fault, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else f"{type(fault).__name__}: {fault}".splitlines()[0]
        raise FileNotFoundError(f"{name} cannot be fetched ({reason}): {how_to_get(name)}") from fault


def how_to_get(name: str) -> str:
    """One sentence that says how to download a published file by hand."""
    file = PUBLISHED[name]
    where = file.page or f"https://huggingface.co/{file.repository}"
    return (
        f"download {name} (about {file.gigabytes} GB, {file.licence}) by hand from {where} and give its path: "
        f"{file.taken_by}"
    )


def _fetch_file(name, repository, on_message):
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if isinstance(cached := try_to_load_from_cache(repository, name), str):
        return Path(cached)
    found = get_hf_file_metadata(hf_hub_url(repository, name))
    on_message(
        f"downloading {name} from {constants.ENDPOINT}/{repository}: {found.size / 1e9:.2f} GB, "
        f"{PUBLISHED[name].licence}, sha256 {found.etag}, into {constants.HF_HUB_CACHE}"
    )
    path = Path(hf_hub_download(repository, name))
    if len(found.etag) == 64 and sha256(path) != found.etag:
        path.resolve().unlink()
        raise OSError(f"what came is not what was announced (sha256 {found.etag}), so it was thrown away")
    return path


def _fetch_folder(name, repository, on_message):
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(repository, dry_run=True)
    except DryRunError:  # no network: what was fetched before has to do
        return Path(
            snapshot_download(
                repository,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["*.fp16.*"],
                local_files_only=True,
            )
        )
    wanted = _of_a_pipeline([file.filename for file in files])
    missing = sum(file.file_size for file in files if file.filename in wanted and file.will_download)
    if missing:
        on_message(
            f"downloading {name} from {constants.ENDPOINT}/{repository}: {missing / 1e9:.2f} GB, "
            f"{PUBLISHED[name].licence}, into {constants.HF_HUB_CACHE}"
        )
    return Path(snapshot_download(repository, allow_patterns=wanted))


def _of_a_pipeline(names):
    """Settings, vocabulary and weights in full precision, of each part the safetensors before the pickle."""
    parts = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    pickles = [name for name in names if name.endswith(".bin") and name.rpartition("/")[0] not in parts]
    plain = [name for name in names if name.endswith((".json", ".txt", ".safetensors"))]
    return [name for name in plain + pickles if ".fp16." not in name]
