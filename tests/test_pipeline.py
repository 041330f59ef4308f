from dataclasses import replace

import pytest
import small
import torch

from refined_ldm.audio import save_audio
from refined_ldm.data import CaptionedAudio
from refined_ldm.pipeline import STAGES, cached_clips, open_data, prepare_latents, train_stage
from refined_ldm.scenes import SoundScenes
from refined_ldm.text_to_audio import RefinedAudioLDM


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """A folder of ten short recordings, named by their captions, of which one is shorter and one longer than a clip."""
    small.use_small_clap(monkeypatch)
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i, item in enumerate(small.clips(10)):
        waveform = {3: item["waveform"][:3000], 4: item["waveform"].repeat(2)}.get(i, item["waveform"])
        save_audio(folder / f"bell_{i}.wav", waveform)
    return folder


def settings(data, **changes):
    stage = replace(small.STAGE, max_steps=2)
    return small.config(data=str(data), training={name: stage for name in STAGES}, **changes)


def test_data_is_opened_by_what_it_is(recordings, tmp_path):
    scenes = small.config(clips=7, seconds=1.28)
    assert isinstance(open_data(scenes), SoundScenes) and len(open_data(scenes)) == 7
    assert open_data(scenes, "test", size=3)[0]["waveform"].shape == (20_480,)
    folder = open_data(settings(recordings))
    assert isinstance(folder, CaptionedAudio) and len(folder) == 10 and folder[0]["caption"] == "bell 0"
    table = recordings / "table.csv"
    table.write_text('file,caption\nbell_1.wav,"a bell, rung once"\n')
    assert open_data(settings(table))[0]["caption"] == "a bell, rung once"
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        open_data(settings(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize("parameterization", ["v", "gaussian"])
def test_all_stages_feed_each_other_and_the_result_is_a_model(recordings, tmp_path, parameterization):
    # A Gaussian of 32 numbers takes more than 32 blocks of four frames: ten clips of 1.28 s have eighty.
    config = settings(recordings, parameterization=parameterization, seconds=1.28)
    run = tmp_path / "run"
    for stage in STAGES:
        model = RefinedAudioLDM(config, seed=4)
        assert [s.index for s in train_stage(model, stage, run)] == [1, 2]
    files = {p.name for p in run.iterdir()}
    assert files == {"checkpoints", "clips-train", "latents-train", "config.yaml", "vae.safetensors", "ldm.safetensors",
                     "hifigan.safetensors", "clap-tiny-gpt2.safetensors"}  # fmt: skip
    loaded = RefinedAudioLDM.load(run)
    assert loaded.config == config and loaded.scale != 1
    assert loaded.generate(["bell"]).shape == (1, 20_480)
    # The U-Net learned from the trained VAE, not from the fresh one it was made with.
    fresh = RefinedAudioLDM(config, seed=4)
    name = "encoder.conv_in.weight"
    assert not torch.equal(loaded.vae.state_dict()[name], fresh.vae.state_dict()[name])


def test_latents_have_unit_variance_and_follow_the_vae(recordings, tmp_path):
    model, told = RefinedAudioLDM(settings(recordings)), []
    clips = cached_clips(model.config, tmp_path)

    def prepare():
        told.clear()
        return prepare_latents(model, clips, tmp_path, on_clips=lambda *progress: told.append(progress))

    latents = prepare()
    assert told == [(10, 10)] and len(latents) == 10
    all_latents = torch.stack([latents[i]["latent"] for i in range(10)])
    assert all_latents.shape == (10, 2, 8, 4) and abs((model.scale * all_latents).std() - 1) < 0.01
    with torch.no_grad():
        expected = model.vae.encode(model.mel(clips[2]["waveform"][None])).mean[0]
        torch.testing.assert_close(latents[2]["latent"], expected, atol=2e-3, rtol=2e-3)  # kept in half precision
        expected = model.clap.embed_text(clips[2]["captions"])
        torch.testing.assert_close(latents[2]["embeddings"], expected, atol=1e-3, rtol=0)
    prepare()
    assert told == []  # taken from disk
    model.vae.encoder.conv_in.weight.data += 1
    prepare()
    assert told == [(10, 10)]  # another VAE, other latents


def test_the_linear_denoiser_knows_the_scaled_latents(recordings, tmp_path):
    model = RefinedAudioLDM(settings(recordings, parameterization="gaussian", seconds=1.28))
    latents = prepare_latents(model, cached_clips(model.config, tmp_path), tmp_path)
    scaled = model.scale * torch.stack([latents[i]["latent"] for i in range(10)])
    power = (model.gaussian.variance + model.gaussian.mean**2).mean()  # of one number of a latent
    torch.testing.assert_close(power, (scaled**2).mean(), rtol=0.01, atol=0)


def test_clips_are_decoded_once(recordings, tmp_path):
    told = []
    config = settings(recordings)
    clips = cached_clips(config, tmp_path, on_clips=lambda *progress: told.append(progress))
    torch.testing.assert_close(clips[4]["waveform"], open_data(config)[4]["waveform"], atol=1 / 32767, rtol=0)
    again = cached_clips(config, tmp_path, on_clips=lambda *progress: told.append(progress))
    assert told == [(10, 10)] and torch.equal(again[4]["waveform"], clips[4]["waveform"])
    assert len(cached_clips(settings(recordings, seconds=0.64), tmp_path)[0]["waveform"]) == 10_240


def test_another_sound_under_the_same_name_is_decoded_again(recordings, tmp_path):
    config = settings(recordings)
    before = cached_clips(config, tmp_path)[1]["waveform"].clone()
    save_audio(recordings / "bell_1.wav", small.clips(10)[7]["waveform"])
    assert not torch.equal(cached_clips(config, tmp_path)[1]["waveform"], before)


def test_unheard_words_share_one_embedding(recordings, tmp_path):
    model = RefinedAudioLDM(settings(recordings))
    list(train_stage(model, "clap", tmp_path / "run"))
    with torch.no_grad():
        unheard, heard = model.clap.embed_text(["zebra", "piano"]), model.clap.embed_text(["bell 1", "bell 2"])
    assert (heard[0] - heard[1]).abs().max() > 1e-4
    table = model.clap.text.get_input_embeddings().weight
    assert len(table.unique(dim=0)) < 40 and unheard.isfinite().all()


def test_stages_in_the_wrong_order_or_unknown_are_refused(recordings, tmp_path):
    model = RefinedAudioLDM(settings(recordings))
    with pytest.raises(ValueError, match="no stage 'unet': choose from vae, clap, ldm, hifigan"):
        next(train_stage(model, "unet", tmp_path))
    with pytest.raises(FileNotFoundError, match="vae.safetensors"):
        next(train_stage(model, "ldm", tmp_path / "empty"))


def test_a_stage_goes_on_where_it_stopped(recordings, tmp_path):
    config = settings(recordings)
    config.training["vae"] = replace(small.STAGE, max_steps=4, save_every=2)
    steps = train_stage(RefinedAudioLDM(config), "vae", tmp_path)
    assert next(steps).index == 1 and next(steps).index == 2
    steps.close()
    assert not (tmp_path / "vae.safetensors").exists()  # it is not finished
    assert [s.index for s in train_stage(RefinedAudioLDM(config), "vae", tmp_path, resume=True)] == [3, 4]
    assert (tmp_path / "vae.safetensors").is_file()
