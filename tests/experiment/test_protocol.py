import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli.commands import main
from refined_ldm.experiment.arms import ARMS, PUBLISHED, TRAINING_LOSS, Arm, Card, Run, comparable, plan
from refined_ldm.experiment.protocol import Experiment, open_experiment
from refined_ldm.experiment.runs import run_arm
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support.small import config, use_small_clap

STORED_RUNS = Path(__file__).parents[2] / "figures" / "data" / "experiment"
CARD = Card(0.25, "v", "v", 0.0, 0.1, 16.0, 256, "stratified", "val-64", "float32", "a CPU", "ms, 1a2b", "cosine", 150)


def test_losses_are_refused_with_every_difference_named():
    comparable(CARD, replace(CARD, drop=0.19, parameterization="eps"))  # converted, and with captions alone
    with pytest.raises(ValueError, match=r"differ in latent_scale: 0\.25 and 0\.31$"):
        comparable(CARD, replace(CARD, latent_scale=0.31, drop=0.2))
    with pytest.raises(
        ValueError, match=r"parameterization: v and eps; audio_share: 0\.0 and 0\.5; drop: 0\.1 and 0\.19"
    ):
        comparable(CARD, replace(CARD, parameterization="eps", audio_share=0.5, drop=0.19), TRAINING_LOSS)
    comparable(CARD, replace(CARD, norm=1.0), TRAINING_LOSS, but=("norm",))
    with pytest.raises(ValueError, match="precision: float32 and bfloat16; conditioner_weights: ms, 1a2b and ms, 3c4d"):
        comparable(CARD, replace(CARD, precision="bfloat16", conditioner_weights="ms, 3c4d"), TRAINING_LOSS)


def test_stored_records_have_the_arms_of_the_plan():
    """Records of every age: without "wide", with the names that settings had then, and with labels that stayed."""
    planned, seen = {run.name: run for run in plan(1500, 3)}, 0
    for path in sorted(STORED_RUNS.glob("*.json")):
        record = json.loads(path.read_text())
        arm, card = Arm.from_record(record["arm"]), Card.from_record(record)
        assert card.latent_scale == record["card"].get("scale", record["card"].get("latent_scale"))
        if path.stem in planned:
            arm = replace(arm, guidance=planned[path.stem].arm.guidance)  # rates were not evaluated again
            assert (arm, record["label"]) == (planned[path.stem].arm, planned[path.stem].label), path.name
            seen += 1
    assert seen > 60
    with pytest.raises(TypeError, match="loudness"):
        Arm.from_record({"loudness": 1})


def test_arms_differ_in_what_is_named_and_in_nothing_else():
    def differences(a, b):
        return {k for k, v in ARMS[a].__dict__.items() if v != ARMS[b].__dict__[k]}

    assert differences("B", "C") == differences("D", "E") == differences("D", "oracle") == {"conditioner"}
    assert differences("B", "E") == differences("C", "D")
    assert differences("D", "tokens") == {"tokens"}
    assert differences("D", "F") == differences("E", "G") == {"conditioner"}
    assert PUBLISHED.lr_schedule == "constant" and PUBLISHED.conditioner_dropout
    assert PUBLISHED.scale_from == "first batch"


def test_the_plan_names_every_run_once_and_gives_every_arm_its_seeds():
    runs = plan(1500, 3)
    assert len({run.name for run in runs}) == len(runs)
    for arm in "ABCDE":
        for iterations in (1500, 6000):
            assert {run.seed for run in runs if (run.label, run.iterations) == (arm, iterations)} == {0, 1, 2}
    assert {run.iterations for run in runs if run.label == "D"} == {0, 150, 300, 500, 600, 1500, 6000}
    branches = [run for run in runs if run.part == "branches"]
    assert [(run.label, run.iterations, run.seed) for run in branches[:30]] == [
        (f"{arm}, wsd", n, seed) for seed in range(3) for n in (750, 1500) for arm in "DEFGB"
    ]  # balanced at every length


def test_all_arms_see_the_same_latents_and_noise(small):
    models = [small.model(Arm("oracle"), 0, 4)[0], small.model(replace(ARMS["D"], conditioner="random"), 0, 4)[0]]
    assert torch.equal(models[0].unet.conv_in.weight, models[1].unet.conv_in.weight)  # and the same beginning
    assert models[0].scale == models[1].scale
    assert not small.config.unet.caption_map and not small.preset_unet.caption_map  # as when the stored runs were made
    first = small.model(replace(PUBLISHED, conditioner="oracle", audio_share=0.0), 0, 4)[0]
    assert first.scale != models[0].scale


def test_the_command_lists_the_plan_and_refuses_other_names(capsys, tmp_path):
    assert main(["experiment", "--list", "--out", str(tmp_path)]) == 0
    assert "B-1500-2" in capsys.readouterr().out
    assert main(["experiment", "Z-1", "--run", str(tmp_path)]) == 2
    assert "no run Z-1" in capsys.readouterr().err


def test_the_arms_train_on_another_models_latents_with_given_conditioners(monkeypatch, tmp_path):
    """As at `colab` and `paper`, in small: a base model from elsewhere, and conditioners from files."""
    use_small_clap(monkeypatch)
    monkeypatch.setitem(CLAP_PRESETS, "ms-clap-2023", CLAP_PRESETS["tiny-gpt2"])
    settings = config(seconds=1.28, clips=12, vocoder="griffin_lim")
    base = RefinedAudioLDM(settings, seed=1)
    base.clap.save(tmp_path / "ms.safetensors")
    shared = Experiment(tmp_path / "run", settings, base, {"laion": "", "ms": tmp_path / "ms.safetensors"}, held_out=4,
                        test_size=4, probe=96)  # fmt: skip
    run = Run("C", replace(ARMS["C"], parameterization="caption-gaussian"), 2, 0, "arms")
    record = run_arm(shared, run, tmp_path / "out", evaluate=False)
    assert record["card"]["width"] == 12 and record["card"]["norm"] == pytest.approx(12**0.5)
    assert shared.model(run.arm, 0, 2)[0].config.clap == "ms-clap-2023"


def test_presets_that_need_published_files_say_which(tmp_path):
    with pytest.raises(ValueError, match="preset paper needs published files: give audioldm, laion, tokenizer"):
        open_experiment(tmp_path, "paper", ms="CLAP_weights_2023.pth")
