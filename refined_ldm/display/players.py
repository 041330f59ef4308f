"""Audio players in a notebook, alone or beside the spectrograms of what they play."""

import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from refined_ldm.display.spectrograms import plot_mels, to_array
from refined_ldm.mel import LDM_MEL, MelConfig, MelSpectrogram


def play(waveform: torch.Tensor, sample_rate: int = 16_000, title: str = "") -> None:
    """Show a player of a waveform (N,) or (1, N) at its own level. Notebook: 01."""
    _show_html(_player(waveform, sample_rate, title))


def compare(
    waveforms: Sequence[torch.Tensor], titles: Sequence[str], config: MelConfig = LDM_MEL, columns: int = 3
) -> Figure:
    """Show the spectrogram and the player of each waveform (B, N), side by side -> figure. Notebook: 01."""
    waveforms = torch.as_tensor(np.stack([to_array(w).reshape(-1) for w in waveforms]))
    figure = plot_mels(MelSpectrogram(config)(waveforms), titles, config, columns)
    plt.show()  # the pictures first, then the players
    cells = [_player(w, config.sample_rate, title) for w, title in zip(waveforms, titles, strict=True)]
    _show_html(f'<div style="display:grid;grid-template-columns:repeat({columns},1fr)">{"".join(cells)}</div>')
    return figure


def _player(waveform: torch.Tensor, sample_rate: int, title: str) -> str:
    from IPython.display import Audio

    audio = Audio(np.clip(to_array(waveform).reshape(-1), -1, 1), rate=sample_rate, normalize=False)
    return f"<div><div>{html.escape(title)}</div>{audio._repr_html_()}</div>"


def _show_html(text: str) -> None:
    from IPython.display import HTML, display

    display(HTML(text))
