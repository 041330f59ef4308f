"""Every layout trains every stage, by name or recognised, with the split that is for training."""

from dataclasses import replace

import pytest
import yaml

from refined_ldm.cli import main
from refined_ldm.config import STAGES
from refined_ldm.data.caches import Cached
from refined_ldm.data.known_sets import KNOWN
from refined_ldm.training.pipeline import default_stages
from tests.support import known_trees, small

LAYOUTS = known_trees.TREES | known_trees.OTHERS


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_stages_train_two_steps(tmp_path, monkeypatch, capsys, name):
    build, splits = LAYOUTS[name]
    data = f"{name}:{{0}}" if name == "clotho" else "{0}"
    small.use_small_clap(monkeypatch)
    root, run = build(tmp_path / "set"), tmp_path / "run"
    stage = replace(small.STAGE, max_steps=2, batch_size=2)
    config = small.config(training={stage_name: stage for stage_name in STAGES})
    config.save(tmp_path / "small.yaml")
    arguments = ["-c", str(tmp_path / "small.yaml"), "--data", data.format(root), "--run", str(run), "--device", "cpu"]
    columns = known_trees.COLUMNS if name == "other columns" else {}
    assert main(["train", *arguments, *(f"--{column}-column={own}" for column, own in columns.items())]) == 0
    printed = capsys.readouterr().out
    for trained in default_stages(config.changed(data=data.format(root))):
        assert f"{trained}: 2 steps" in printed
    clips = Cached(run / "clips-train")
    assert (len(clips), sum(len(clip["captions"]) for clip in clips)) == splits.get("train", splits[""])
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["data"] == data.format(root)
    assert {column: written[f"{column}_column"] for column in columns} == columns
    assert (run / "left-out.txt").is_file() == (name in KNOWN and KNOWN[name].incomplete)
    if name == "audiocaps":
        assert "no sound file of 'gone_gone_g'" in (run / "left-out.txt").read_text()


def test_a_split_that_is_not_there_stops_before_any_work(tmp_path, monkeypatch, capsys):
    small.use_small_clap(monkeypatch)
    root = known_trees.esc50(tmp_path / "set")
    small.config().save(tmp_path / "small.yaml")
    arguments = ["-c", str(tmp_path / "small.yaml"), "--data", f"esc50:{root}", "--run", str(tmp_path / "run")]
    assert main(["train", *arguments, "--split", "fold9", "--device", "cpu"]) == 2
    assert not any((tmp_path / "run").iterdir())
    assert "ESC-50 has no split 'fold9', only fold1, fold2" in capsys.readouterr().err


def test_columns_without_a_table_are_refused(tmp_path, capsys):
    small.config().save(tmp_path / "small.yaml")
    arguments = ["-c", str(tmp_path / "small.yaml"), "--run", str(tmp_path / "run"), "--file-column", "path"]
    assert main(["train", *arguments, "--device", "cpu"]) == 2
    assert "give them with --data" in capsys.readouterr().err
