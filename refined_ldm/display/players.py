"""Audio players in a notebook, alone or beside the spectrograms of what they play."""

import base64
import html
import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure

from refined_ldm.display.spectrograms import plot_waveform_mels, to_array
from refined_ldm.mel import LDM_MEL, MelConfig


def play(waveform: torch.Tensor, sample_rate: int = 16_000, title: str = "") -> None:
    """Show a player of a waveform (N,) or (1, N) at its own level. Notebook: 01."""
    _show_html(_player(waveform, sample_rate, title))


def compare(
    waveforms: Sequence[torch.Tensor], titles: Sequence[str], config: MelConfig = LDM_MEL, columns: int = 3
) -> Figure:
    """Show the spectrogram and the player of each waveform (B, N), side by side -> figure. Notebook: 01."""
    waveforms = [to_array(w).reshape(-1) for w in waveforms]
    figure = plot_waveform_mels(waveforms, titles, config, columns)
    plt.show()  # the pictures first, then the players
    _show_html(players(waveforms, titles, config.sample_rate, columns))
    return figure


def players(
    waveforms: Sequence[torch.Tensor], titles: Sequence[str], sample_rate: int = 16_000, columns: int = 3
) -> str:
    """A grid of players of waveforms (N,), each with its title above it -> HTML that holds the sounds."""
    cells = [_player(w, sample_rate, title) for w, title in zip(waveforms, titles, strict=True)]
    return f'<div style="display:grid;grid-template-columns:repeat({columns},1fr)">{"".join(cells)}</div>'


def _player(waveform: torch.Tensor, sample_rate: int, title: str) -> str:
    wav = io.BytesIO()
    soundfile.write(wav, np.clip(to_array(waveform).reshape(-1), -1, 1), sample_rate, subtype="PCM_16", format="WAV")
    source = f"data:audio/wav;base64,{base64.b64encode(wav.getvalue()).decode()}"
    return f'<div><div>{html.escape(title)}</div><audio controls="controls" src="{source}"></audio></div>'


def _show_html(text: str) -> None:
    from IPython.display import HTML, display

    display(HTML(text))
