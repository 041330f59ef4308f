"""A conditioner from its authors' file: MS-CLAP 2023 or LAION-CLAP, downloaded if needed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.published.checkpoints import read_tensors
from refined_ldm.published.clap_weights import clap_from_published, clap_kind
from refined_ldm.published.hub import CONDITIONERS, fetch, how_to_get
from refined_ldm.weights import load_into


def load_conditioner(name: str, checkpoint: str | Path | None = None, tokenizer: str | Path | None = None) -> Clap:
    """The conditioner `name` (in CONDITIONERS) from its published file, or from its hub if none is given.

    Raises FileNotFoundError, saying what to download, if the file is missing; ValueError for another file.
    """
    if checkpoint is None:
        checkpoint = fetch(CONDITIONERS[name])
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"no file {checkpoint}: {how_to_get(CONDITIONERS[name])}")
    return conditioner_from_tensors(name, read_tensors(checkpoint), checkpoint, tokenizer)


def conditioner_from_tensors(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    source: str | Path,
    tokenizer: str | Path | None = None,
    max_tokens: int = 77,
) -> Clap:
    """The conditioner `name` with the authors' tensors, by their names. Raises ValueError naming `source`."""
    kind = clap_kind(tensors)
    if kind and not kind.startswith(name):
        raise ValueError(f"{source} is no {name} checkpoint but {kind}")
    try:
        config, state = clap_from_published(replace(CLAP_PRESETS[name], max_tokens=max_tokens), tensors)
    except ValueError as fault:
        raise ValueError(f"{source} is no {name} checkpoint: {fault}") from fault
    clap = Clap(config, tokenizer)
    if not config.audio_depths:  # what only the audio tower needs is not in such a file
        state = {"mel_bank": clap.mel_bank, "logit_scale": clap.logit_scale.data, **state}
    return load_into(clap, state, source).eval()
