import numpy as np
import pytest
import torch

from refined_ldm.cli import commands as cli
from refined_ldm.config import StageConfig
from refined_ldm.data.caches import CACHED_KEYS, cache_clips
from refined_ldm.evaluation.details import (
    DETAILS,
    NAMES,
    SIZES,
    DetailAnswers,
    DetailJudge,
    ask_details,
    disturb,
    judge_details,
    judge_loss,
    show_table,
    table_of,
    targets_of,
    train_judge,
    twin_gaps,
    wanted_of,
)
from refined_ldm.scenes.captions import Caption, Clause
from refined_ldm.scenes.dataset import SoundScenes
from tests.support import small

DOG = Clause("dog", "a *dog|barks|barking|", count=2, counted=True, adjective="big")
BIRD = Clause("bird", "a *bird|chirps|chirping|", count=4, manner=" rapidly")
THEN = Caption("sequence", "{a}, then {b}", (DOG, BIRD))


def test_what_a_caption_asks_for():
    assert wanted_of(THEN) == {
        "number": [("dog", 2)], "pitch": [("dog", 0)], "pace": [("bird", 1)], "order": [("dog", 0), ("bird", 1)],
    }  # fmt: skip


def test_selected_captions_name_every_detail():
    asked = ask_details(4)
    named = [wanted_of(a.caption) for a in asked]
    counts = {detail: sum(detail in of for of in named) for detail in DETAILS}
    assert min(counts[d] for d in DETAILS if d != "distance") >= 4 and counts["distance"] > 0  # one in eight is far
    assert len({a.item["id"] for a in asked}) == len(asked)


def _answers(captions, silent=()):
    """A judge that detects exactly what each caption says, in all but the silent ones."""
    classes = np.full((len(captions), len(NAMES)), -5.0)
    of_class = []
    for i, caption in enumerate(captions):
        said = wanted_of(caption)
        for clause in caption.clauses:
            classes[i, NAMES.index(clause.name)] = 5
        of_class.append({
            clause.name: {d: dict(said.get(d, ())).get(clause.name, 0) for d in DETAILS} for clause in caption.clauses
        })  # fmt: skip
    return DetailAnswers(captions, classes, of_class, np.array([i in silent for i in range(len(captions))]))


def test_a_perfect_sound_is_right_in_all_and_a_silent_one_in_nothing():
    other = Caption("event", "{a}", (Clause("dog", DOG.phrase, 3, True, "small"),))
    right = _answers([THEN, other, THEN, other]).right()
    assert all(r.all() for d, r in right.items() if len(r)) and len(right["number"]) == 4 and len(right["order"]) == 2
    silent = _answers([THEN, other], silent=(0,)).right()
    assert silent["number"].tolist() == [0, 1] and silent["class"].tolist() == [0, 1] == silent["nothing else"].tolist()


def test_chance_holds_answers_against_other_captions():
    once = Caption("event", "{a}", (Clause("dog", DOG.phrase, 1, True),))
    chance = _answers([once, THEN] * 4).right(chance=True)
    assert chance["number"].mean() == 1  # half the list further on the same stands
    assert _answers([once] * 4 + [THEN] * 4).right(chance=True)["number"].mean() == 0
    assert chance["order"].tolist() == [0.5] * 4


def test_an_extra_sound_is_not_nothing_else():
    answers = _answers([THEN])
    answers.classes[0, NAMES.index("rain")] = 1.0
    right = answers.right()
    assert right["class"][0] == 1 and right["nothing else"][0] == 0


def test_targets_are_the_metadata():
    item = SoundScenes("val", 30)[1]
    row, name, heard, events = targets_of([item])
    assert row.tolist() == [0, 0] and {NAMES[i] for i in name} == set(item["labels"]) and heard.sum() == 2
    values, known = events["onset"]
    assert known.all() and values.tolist() == pytest.approx([e.onset for e in item["events"]])
    counted = [e.count is not None for e in item["events"]]
    assert events["count"][1].tolist() == counted


def test_the_loss_is_zero_for_the_truth():
    item = SoundScenes("val", 30)[1]
    row, name, heard, events = targets_of([item])
    answers = {}
    for key, size in SIZES.items():
        value = events[key][0]
        if size > 1:
            answers[key] = 100 * torch.nn.functional.one_hot(value.long(), size).float()
        else:
            answers[key] = (200 * value - 100 if key == "distant" else value)[:, None]
    assert judge_loss(200 * heard - 100, answers, heard, events)["loss"] < 1e-4


def test_disturbance_keeps_shape_and_changes_each_clip_in_its_own_way():
    mel = torch.randn(3, 1, 32, 64) - 5
    disturbed = disturb(mel, torch.Generator().manual_seed(0))
    assert disturbed.shape == mel.shape
    changes = (disturbed - mel).mean((1, 2, 3))
    assert changes.unique().numel() == 3 and changes.abs().max() < 4


def test_a_judge_learns_and_comes_back_from_its_file(tmp_path):
    scenes = SoundScenes("val", 8, 1.28)
    clips = cache_clips(tmp_path / "clips", scenes, {"kept": list(CACHED_KEYS)})
    steps = list(train_judge(clips, StageConfig(4, 4, 3e-3, warmup_steps=1)))
    judge = steps[-1][0].eval()
    judge.save(tmp_path / "judge.safetensors", torch.float32)
    again = DetailJudge.load(tmp_path / "judge.safetensors")
    waveforms, captions = torch.stack([clips[i]["waveform"] for i in range(2)]), [THEN, THEN]
    first, second = (judge_details(j, waveforms, captions) for j in (judge, again))
    np.testing.assert_allclose(first.classes, second.classes)
    assert first.of_class == second.of_class
    with pytest.raises(ValueError, match="one caption for each sound, got 1 captions and 2 sounds"):
        judge_details(judge, waveforms, captions[:1])


def test_tables_have_a_line_for_each_detail():
    rows = table_of({"rendered": _answers([THEN] * 4), "generated": _answers([THEN] * 4, silent=(1,))})
    generated = {row["detail"]: row["value"] for row in rows if row["sound"] == "generated"}
    assert generated["number"] == 0.75 and generated["silent"] == 0.25 and "distance" not in generated
    assert any(line.startswith("number") and "0.75" in line for line in show_table(rows).splitlines())


def test_evaluate_wants_folders_or_details(capsys):
    assert cli.main(["evaluate"]) == 2 and "--details" in capsys.readouterr().err


def test_an_unconditional_denoiser_has_no_gap_and_a_conditional_one_has(monkeypatch):
    model = small.awake_model(monkeypatch, seconds=1.28)
    asked = ask_details(1, seconds=1.28)[:2]
    rows = twin_gaps(model, asked, timesteps=(900,))
    assert {row["detail"] for row in rows} >= {"other scene"} and any(row["gap"] != 0 for row in rows)
    monkeypatch.setattr(model, "denoise", lambda z_t, t, c: 0 * z_t)
    assert all(row["gap"] == 0 == row["value"] for row in twin_gaps(model, asked, timesteps=(900,)))
