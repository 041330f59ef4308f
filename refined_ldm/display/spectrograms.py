"""Waveforms and log-mel spectrograms as pictures: axes in seconds, Hz and dB, one colour map.

Functions draw into `ax`, or make a figure of their own, and return the axes (or the figure, where there are several).
"""

import math
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from refined_ldm.audio import pad_or_trim
from refined_ldm.base.integers import whole
from refined_ldm.mel import LDM_MEL, MelConfig, MelSpectrogram, hz_to_mel

RANGE = 80  # dB below the loudest point that a spectrogram shows
TICKS = (125, 500, 1000, 2000, 4000, 8000, 16_000)  # Hz


def plot_waveform(waveform: torch.Tensor, sample_rate: int = 16_000, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw a waveform (N,) or (1, N) over seconds -> axes. Notebook: 01."""
    ax = ax or plt.figure(figsize=(8, 1.8)).subplots()
    waveform = to_array(waveform).reshape(-1)
    ax.plot(np.arange(len(waveform)) / sample_rate, waveform, linewidth=0.5)
    ax.set(xlabel="time (s)", ylabel="amplitude", title=title, xlim=(0, len(waveform) / sample_rate))
    return ax


def plot_mel(mel: torch.Tensor, config: MelConfig = LDM_MEL, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw one log-mel (1, 1, T, F), (1, T, F) or (T, F), in dB above the floor -> axes. Notebook: 01.

    Raises ValueError if `mel` holds more than one spectrogram.
    """
    shape = tuple(mel.shape)
    if mel.ndim < 2 or math.prod(shape[:-2]) != 1:
        raise ValueError(f"mel must be one spectrogram (1, 1, T, F) or (T, F), got {shape}: plot_mels draws several")
    ax = ax or plt.figure().subplots()
    levels = _decibels(mel, config).reshape(shape[-2:])
    image = _draw_mel(ax, levels, config, levels.max())
    ax.set(xlabel="time (s)", ylabel="frequency (Hz)", title=title)
    ax.figure.colorbar(image, ax=ax, label="dB above the floor", pad=0.01)
    return ax


def plot_mels(
    mels: torch.Tensor,
    titles: Sequence[str] = (),
    config: MelConfig = LDM_MEL,
    columns: int = 3,
    size: tuple[float, float] = (2.6, 1.9),
    title: str = "",
) -> Figure:
    """Draw log-mels (B, 1, T, F) in a grid with one colour scale, each `size` inches, under one title -> figure.

    Raises ValueError if `mels` has another shape.
    """
    if mels.ndim != 4 or mels.shape[1] != 1:
        raise ValueError(f"mels must be (B, 1, T, F), got {tuple(mels.shape)}")
    levels = _decibels(mels, config)[:, 0]  # (B, T, F)
    columns = min(whole("columns", columns, 1), len(levels))
    rows = math.ceil(len(levels) / columns)
    figure = plt.figure(figsize=(max(5, size[0] * columns), 0.5 + size[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.flat[len(levels) :]:
        ax.set_axis_off()
    for k, ax in enumerate(grid.flat[: len(levels)]):
        image = _draw_mel(ax, levels[k], config, levels.max(), TICKS if size[1] > 1.5 else TICKS[1::2])
        above = textwrap.fill(titles[k], int(11 * size[0])) if k < len(titles) else ""
        ax.set_title(above, fontsize=10 if size[0] > 1.2 else 9, loc="left")
        lowest = k + columns >= len(levels)
        ax.tick_params(labelbottom=lowest)
        ax.set_xlabel("time (s)" if lowest else "")
        if k % columns == 0:
            ax.set_ylabel("frequency (Hz)" if size[1] > 1.5 else "Hz")
    figure.colorbar(image, ax=grid, label="dB above the floor", pad=0.01)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def plot_waveform_mels(
    waveforms: Sequence[torch.Tensor], titles: Sequence[str] = (), config: MelConfig = LDM_MEL, columns: int = 3
) -> Figure:
    """Draw the log-mels of waveforms (N,), of one length or several, as `plot_mels` does -> figure."""
    waveforms = [torch.from_numpy(to_array(waveform)) for waveform in waveforms]
    samples = -(-max(map(len, waveforms)) // config.hop_length) * config.hop_length
    mels = MelSpectrogram(config)(torch.stack([pad_or_trim(waveform, samples) for waveform in waveforms]))
    return plot_mels(mels, titles, config, columns)


def to_array(x: torch.Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    """A tensor on any device, an array or numbers -> a float array."""
    return x.detach().float().cpu().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float32)


def _draw_mel(ax: Axes, levels: np.ndarray, config: MelConfig, top: float, ticks: Sequence[int] = TICKS) -> AxesImage:
    """levels (T, F) and top, the brightest, in dB -> image."""
    top = max(top, 1.0)  # all silence is black
    frames, bands = levels.shape
    image = ax.imshow(
        levels.T,
        origin="lower",
        aspect="auto",
        extent=(0, frames * config.hop_length / config.sample_rate, -0.5, bands - 0.5),
        interpolation="nearest",
        cmap="magma",
        vmin=max(0, top - RANGE),
        vmax=top,
    )
    shown = [hz for hz in ticks if config.fmin <= hz <= config.fmax]
    heights = [_height(hz, config, bands) for hz in shown]
    ax.set_yticks(heights, [f"{hz // 1000}k" if hz >= 1000 else str(hz) for hz in shown])
    return image


def _height(hz: float, config: MelConfig, bands: int) -> float:
    """Where a frequency in Hz is drawn. Band k of `bands` lies k + 1 steps of mel above fmin, and is at height k."""
    low, high, at = (hz_to_mel(x).item() for x in (config.fmin, config.fmax, hz))
    return float(np.clip((at - low) / (high - low) * (bands + 1) - 1, -0.5, bands - 0.5))


def mark_stretch(
    ax: Axes, seconds: tuple[float, float], band: tuple[float, float] | None = None, config: MelConfig = LDM_MEL
) -> None:
    """Frame a stretch in s, and in Hz if there is a band, of the spectrogram that `ax` shows. Notebook: 07."""
    low, high = (_height(hz, config, config.n_mels) for hz in band or (config.fmin, config.fmax))
    style = {"fill": False, "edgecolor": "white", "linewidth": 2, "linestyle": "--"}
    ax.add_patch(plt.Rectangle((seconds[0], low), seconds[1] - seconds[0], high - low, **style))


def _decibels(mel: torch.Tensor, config: MelConfig) -> np.ndarray:
    return 20 / math.log(10) * (to_array(mel) - math.log(config.floor))
