"""Pictures of a data set: how long, how loud and how described its clips are."""

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from refined_ldm.data.report import FULL_SCALE, DataReport


def plot_data_report(report: DataReport) -> Figure:
    """Draw lengths, sample rates, peak levels and words per caption of a data set -> figure."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    (lengths, rates), (peaks, words) = axes
    lengths.hist([clip.seconds for clip in report.clips], bins=30)
    lengths.axvline(report.clip_seconds, color="black", linestyle="--")
    lengths.set(xlabel="length, s", title=f"Lengths; training uses {report.clip_seconds:g} s of each clip")
    counts = sorted(Counter(clip.rate for clip in report.clips).items())
    rates.bar([f"{rate / 1000:g}" for rate, _ in counts], [count for _, count in counts])
    rates.set(xlabel="sample rate, kHz", title="Sample rates; all are resampled to 16 kHz")
    levels = 20 * np.log10(np.maximum([clip.peak for clip in report.clips], 1e-5))
    peaks.hist(levels, bins=30)
    peaks.axvline(20 * np.log10(FULL_SCALE), color="black", linestyle="--")
    clipped = sum(clip.clipped for clip in report.clips)
    peaks.set(xlabel="peak, dB of full scale", title=f"Peaks as recorded; {clipped} clips are clipped")
    most = [len(caption.split()) for clip in report.clips for caption in clip.captions]
    words.hist(most, bins=np.arange(0.5, max(most) + 1))
    words.set(xlabel="words in a caption", title=f"{len(most)} captions of {len(report.clips)} clips")
    for ax, counted in zip(axes.flat, ("clips", "clips", "clips", "captions"), strict=True):
        ax.set_ylabel(counted)
    return figure
