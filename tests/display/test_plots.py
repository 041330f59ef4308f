"""Pictures show the right place in the right unit, players change nothing, and a figure says where it comes from."""

import base64
import csv
import io
import json
import re
import sys
import time

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.io.wavfile
import torch

from refined_ldm import display
from refined_ldm.mel import LDM_MEL, MelConfig, MelSpectrogram
from refined_ldm.training.loop import Step


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """What IPython would show, as a list that grows."""
    items = []
    monkeypatch.setattr("IPython.display.display", items.append)
    return items


def sine(hz, seconds=0.5, sample_rate=16_000):
    return 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(int(seconds * sample_rate)) / sample_rate)[None]


@pytest.mark.parametrize("config", [LDM_MEL, MelConfig(22_050, 1024, 256, 80, 0, 8000)], ids=["16k", "22k"])
@pytest.mark.parametrize("hz", [500, 2000, 4000])
def test_a_tone_is_drawn_at_its_tick_and_over_its_seconds(hz, config):
    samples = 64 * config.hop_length
    mel = MelSpectrogram(config)(sine(hz, 1, config.sample_rate)[:, :samples])
    ax = display.plot_mel(mel, config)
    (image,) = ax.images
    brightest = np.asarray(image.get_array()).mean(axis=1).argmax()
    tick = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert abs(brightest - tick[f"{hz // 1000}k" if hz >= 1000 else str(hz)]) < 1
    assert image.get_extent()[1] == pytest.approx(samples / config.sample_rate)


def test_decibels_count_from_the_floor():
    mel = torch.full((1, 1, 8, 64), LDM_MEL.floor).log()
    mel[..., 3, 10] += np.log(100.0)
    (image,) = display.plot_mel(mel).images
    values = np.asarray(image.get_array())
    assert values[10, 3] == pytest.approx(40, abs=1e-3) and values[0, 0] == pytest.approx(0, abs=1e-3)


def test_a_batch_shares_one_colour_scale_and_has_no_empty_axes():
    mels = torch.stack([MelSpectrogram()(sine(440) * gain)[0] for gain in (1, 0.1, 0.01)])
    figure = display.plot_mels(mels, ["loud", "soft", "softer"], columns=2)
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in drawn] == ["loud", "soft", "softer"]
    assert len({ax.images[0].get_clim() for ax in drawn}) == 1
    with pytest.raises(ValueError, match="plot_mels draws several"):
        display.plot_mel(mels)


def test_a_player_plays_the_samples_it_was_given(shown):
    waveform = sine(440) * 0.02  # soft, and soft it must stay
    display.play(waveform, title="a <soft> tone")
    (page,) = [item.data for item in shown]
    rate, data = scipy.io.wavfile.read(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])))
    assert rate == 16_000 and "a &lt;soft&gt; tone" in page
    np.testing.assert_allclose(data / 32767, waveform[0], atol=1e-4)


def test_compare_has_a_picture_and_a_player_for_each(shown):
    figure = display.compare([sine(440)[0], sine(880)[0]], ["low", "high"])
    assert sum(bool(ax.images) for ax in figure.axes) == 2 and shown[0].data.count("<audio") == 2


def test_loss_curves_of_numbers_of_steps_and_of_their_parts():
    steps = [Step(10 * k, 2.0, {"loss": 2.0, "kl": 0.5}, 1e-3, 0.0) for k in range(1, 6)]
    assert display.loss_curve([2.0] * 5).lines[1].get_xdata()[-1] == 4
    line = display.loss_curve(steps, labels=["kl"]).lines[1]
    np.testing.assert_allclose((line.get_xdata()[-1], *line.get_ydata()), (50, *[0.5] * 5))
    both = display.loss_curve({"a": [1.0, 2.0], "b": steps}, log=True)
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["a", "b"] and both.get_yscale() == "log"


def test_running_mean_is_centred():
    np.testing.assert_allclose(display.running_mean(np.arange(9.0), 3), [0.5, *range(1, 8), 7.5])


def test_loss_by_timestep_means_each_range():
    ax = display.loss_by_timestep(torch.tensor([0, 99, 500, 999]), torch.tensor([1.0, 3.0, 5.0, 7.0]), bins=10)
    means = ax.lines[0].get_ydata()
    assert (means[0], means[5], means[9]) == (2, 5, 7) and np.isnan(means[[1, 8]]).all()


def test_bars_have_their_intervals():
    rows = [{"label": name, "value": v, "low": v - 1, "high": v + 2} for name, v in (("a", 3.0), ("b", 5.0))]
    ax = display.bars(rows, ylabel="score")
    assert [bar.get_height() for bar in ax.patches] == [3, 5]
    ends = ax.collections[0].get_segments()
    np.testing.assert_allclose([end[:, 1] for end in ends], [(2, 5), (4, 7)])


def test_source_comes_with_its_file_and_line(shown):
    display.show_source(MelSpectrogram.forward)
    (page,) = [item.data for item in shown]
    assert page.startswith("`refined_ldm/mel.py`, line ") and "```python\ndef forward(self, waveform):" in page


def test_explore_starts_at_the_defaults_and_does_without_ipywidgets(shown, monkeypatch, capsys):
    def f(hop=160, window="hann"):
        if window == "box":
            raise ValueError("no box")
        print(hop, window)

    if pytest.importorskip("ipywidgets"):
        display.explore(f, hop=(40, 320, 40), window=["hann", "box"])
        hop, window, screen = shown[0].children
        assert [output["text"] for output in screen.outputs] == ["160 hann\n"]
        hop.value = 320
        assert screen.outputs[0]["text"] == "320 hann\n"
        window.value = "box"
        assert screen.outputs[0]["text"] == "no box\n"
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    display.explore(f, hop=(40, 320, 40))
    assert "need ipywidgets" in capsys.readouterr().out and len(shown) == 1


def test_a_figure_is_written_with_its_table_and_its_origin(tmp_path):
    pandas = pytest.importorskip("pandas")
    figure = plt.figure()
    columns = {"t": [1, 2], "loss": torch.tensor([0.5, 0.25])}
    for table in (columns, pandas.DataFrame({k: np.array(v) for k, v in columns.items()})):
        display.save_figure(figure, "01_x", table, {"seed": 3}, time.perf_counter(), folder=tmp_path)
        with open(tmp_path / "data" / "01_x.csv") as file:
            assert list(csv.reader(file)) == [["t", "loss"], ["1", "0.5"], ["2", "0.25"]]
    origin = json.loads((tmp_path / "data" / "01_x.json").read_text())
    assert origin["parameters"] == {"seed": 3} and origin["seconds"] < 60 and origin["versions"]["torch"]
    assert {path.name for path in tmp_path.rglob("*")} == {"01_x.png", "data", "01_x.csv", "01_x.json"}
