import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from refined_ldm.cli import measure_lora, train_classifier
from refined_ldm.cli.measure_lora import FROGS, LEARNED, OWN, draw, recordings
from refined_ldm.data.sources import open_recordings
from refined_ldm.data.tables import write_recordings
from refined_ldm.scenes.unheard import frogs


def test_what_is_learned_is_never_what_is_compared_with(tmp_path):
    items = frogs(LEARNED + 3, seconds=1)
    table = write_recordings(tmp_path / "frogs", items)
    written = open_recordings(str(table), "", 1.0)
    assert len(written) == len(items) and written[4]["caption"] == items[4]["caption"]
    torch.testing.assert_close(written[4]["waveform"], items[4]["waveform"], atol=1e-4, rtol=0)
    for data in (str(table), ""):
        learned, held_out = recordings(data, 3, 1.0)
        assert (len(learned), len(held_out)) == (LEARNED, 3)
        assert not any(torch.equal(a["waveform"], b["waveform"]) for a in learned for b in held_out)
    with pytest.raises(FileExistsError):
        write_recordings(tmp_path / "frogs", items)
    few = write_recordings(tmp_path / "few", items[:5])
    with pytest.raises(ValueError, match="has 5 recordings: 32 or more are needed"):
        recordings(str(few), 3, 1.0)


def test_each_set_of_recordings_has_its_panel_and_the_details_have_one():
    row = {"value": 0.5, "low": 0.4, "high": 0.6}
    cases = itertools.product((FROGS, OWN), ("Fréchet distance", "class", "number"), ("base", "LoRA"))
    rows = [{"recordings": what, "measure": measure, "sound": sound, **row} for what, measure, sound in cases]
    figure = draw(pd.DataFrame(rows))
    assert [ax.get_title(loc="left") for ax in figure.axes] == [FROGS, OWN, "old captions"]
    plt.close(figure)


@pytest.mark.parametrize("module, work, words, message", [
    (measure_lora, "measure", ["1"], "CLIPS: must be a whole number, 2 or more, got 1"),
    (measure_lora, "measure", ["48", "many"], "DETAILS: must be a whole number, 1 or more, got 'many'"),
    (train_classifier, "train", ["-1"], "SCENES: must be a whole number, 1 or more, got -1"),
    (train_classifier, "train", ["1.5"], "SCENES: must be a whole number, 1 or more, got '1.5'"),
])  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused_before_any_work(monkeypatch, capsys, module, work, words, message):
    monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="2"):
        module.main(words)
    assert message in capsys.readouterr().err


def test_whole_floats_are_the_numbers_they_are(monkeypatch):
    asked = []
    monkeypatch.setattr(measure_lora, "measure", lambda **given: asked.append(given))
    monkeypatch.setattr(train_classifier, "train", asked.append)
    measure_lora.main(["48.0", "4e1"]), train_classifier.main(["100.0"])
    assert asked == [{"clips": 48, "details": 40, "data": ""}, 100]
