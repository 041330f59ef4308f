from dataclasses import replace

import pytest
import torch

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.data.caches import cache_clips
from refined_ldm.experiment import conditioners
from refined_ldm.experiment.arms import ARMS, Run
from refined_ldm.experiment.conditioners import (
    TOKENS,
    Oracle,
    Tokens,
    embedded_captions,
    embedded_sounds,
    prepare_conditioners,
)
from refined_ldm.experiment.protocol import Experiment
from refined_ldm.scenes.dataset import SoundScenes
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support.small import config, use_small_clap


def test_the_oracle_encodes_order_and_kind_alone():
    scenes = SoundScenes("test_order", 8)
    a, b = scenes[0], scenes[1]  # twins
    oracle = Oracle([a, b], 256)
    found = oracle.embed_text([a["captions"][0], a["captions"][1], b["captions"][0], ""])
    assert found.shape == (4, 256)
    assert torch.equal(found[0], found[1])  # however it is worded
    assert (found[0] * found[2]).sum() < 0.5  # the other order
    assert not found[3].any()


def test_the_oracle_cannot_read_and_can_be_given_more():
    scenes = SoundScenes("test_order", 8)
    oracle = Oracle([scenes[0]], 256)
    with pytest.raises(ValueError, match="no scene for '.*': add its scene with `learn`"):
        oracle.embed_text(scenes[2]["captions"])
    oracle.learn([scenes[2]])
    assert oracle.embed_text(scenes[2]["captions"]).any(1).all()


class _Reader(torch.nn.Module):
    embedding_dim = 4

    def text_states(self, captions):
        lengths = [len(caption.split()) for caption in captions]
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return torch.ones(len(captions), max(lengths), 3), mask

    def embed_text(self, captions):
        return torch.zeros(len(captions), 4)


def test_token_states_come_behind_the_embedding_and_padding_is_zero():
    found = Tokens(_Reader()).embed_text(["a dog", " ".join(["rain"] * 30)])
    states = found[:, 4:].unflatten(1, (TOKENS, 3))
    assert (states.abs().sum(2) > 0).sum(1).tolist() == [2, TOKENS]


def test_embeddings_of_captions_and_of_sounds_are_kept_in_the_order_of_the_clips(tmp_path):
    clips = cache_clips(tmp_path / "clips", SoundScenes("train", 5), {"of": "scenes"})
    lengths = embedded_captions(tmp_path / "captions", clips, lambda texts: torch.tensor([[len(t)] for t in texts]))
    assert [lengths[i]["embeddings"][:, 0].tolist() for i in range(5)] == [
        [len(caption) for caption in clips[i]["captions"]] for i in range(5)]  # fmt: skip

    class Ear:
        def embed_audio(self, waveform, sample_rate):
            assert sample_rate == 16_000
            return waveform.abs().amax(1, keepdim=True)

    peaks = embedded_sounds(tmp_path / "sounds", clips, Ear())
    for i in range(5):
        torch.testing.assert_close(peaks[i]["embeddings"][0], clips[i]["waveform"].abs().max()[None], rtol=1e-3, atol=0)


def test_conditioners_trained_on_details_start_from_those_that_were_not(monkeypatch, tmp_path):
    use_small_clap(monkeypatch)
    settings = config(seconds=1.28, clips=12, vocoder="griffin_lim")
    shared = Experiment(tmp_path, settings, RefinedAudioLDM(settings, seed=1), held_out=4, test_size=4)
    monkeypatch.setattr(conditioners, "train_conditioner", lambda *args, **kwargs: iter(()))
    seen = []
    prepare_conditioners(shared, [Run("F", ARMS["F"], 2, 0, "arms")], on_step=lambda stage, step: seen.append(stage))
    assert seen == ["details-text"] * 6
    plain, detailed = shared.trained_clap("ms"), shared.conditioner(ARMS["F"])
    assert not torch.equal(plain.embed_text(["a dog barks twice"]), detailed.embed_text(["a dog barks twice"]))
    with pytest.raises(FileNotFoundError, match="clap-tiny-roberta-details"):
        shared.conditioner(ARMS["G"])
    narrow = replace(CLAP_PRESETS["tiny-gpt2"], embedding_dim=8)  # as LAION-CLAP beside a U-Net for MS-CLAP
    Clap(narrow).save(shared.clap_path("laion"))
    prepare_conditioners(shared, [Run("G", ARMS["G"], 2, 0, "arms")])
    assert shared.conditioner(ARMS["G"]).embedding_dim == 8
