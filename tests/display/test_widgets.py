"""Source code comes with its place, and sliders call their function."""

import sys

import pytest

from refined_ldm import display
from refined_ldm.mel import MelSpectrogram


def test_source_comes_with_its_file_and_line(shown):
    display.show_source(MelSpectrogram.forward)
    (page,) = [item.data for item in shown]
    assert (
        page.startswith("`refined_ldm/mel.py`, line ")
        and "```python\ndef forward(self, waveform: Tensor) -> Tensor:" in page
    )


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
        display.explore(lambda stretch: print(stretch), stretch=((0.0, 2.0, 0.5), (0.5, 1.0)))
        stretch, screen = shown[1].children
        stretch.value = (1.0, 1.5)
        assert screen.outputs[0]["text"] == "(1.0, 1.5)\n" and (stretch.min, stretch.max) == (0, 2)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    display.explore(f, hop=(40, 320, 40))
    assert "need ipywidgets" in capsys.readouterr().out and len(shown) == 2


def test_what_is_not_as_expected_is_printed_and_nothing_stops(capsys):
    display.report_unless(True, "this is so")
    assert capsys.readouterr().out == ""
    display.report_unless(False, "captions are followed")
    assert capsys.readouterr().out.startswith("NOT in this run: captions are followed. ")
