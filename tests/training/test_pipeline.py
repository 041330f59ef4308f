import json
import re
import shutil
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from refined_ldm.audio import save_audio
from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli import commands as cli
from refined_ldm.conditioning import CaptionMap
from refined_ldm.data.caches import Cached
from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.published.warm_start import load_named_parts
from refined_ldm.scenes.dataset import SoundScenes
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.inputs import cached_clips, encode_clips, open_data, prepare_latents
from refined_ldm.training.pipeline import DETAILS, STAGES, check_files, check_run, default_stages, train_stage
from refined_ldm.unet import UNet
from refined_ldm.vae import PatchDiscriminatorConfig
from refined_ldm.weights import read_weights
from tests.support import published_yaml, small


def record(folder):
    """A folder of ten short recordings, named by their captions, of which one is shorter and one longer than a clip."""
    for i, item in enumerate(small.clips(10)):
        waveform = {3: item["waveform"][:3000], 4: item["waveform"].repeat(2)}.get(i, item["waveform"])
        save_audio(folder / f"bell_{i}.wav", waveform)
    return folder


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    small.use_small_clap(monkeypatch)
    return record(tmp_path / "recordings")


def settings(data, **changes):
    stage = replace(small.STAGE, max_steps=2)
    crops = {"vae": 16, "hifigan": 16}  # frames
    training = {name: replace(stage, crop_frames=crops.get(name, 0)) for name in STAGES}
    return small.config(data=str(data), training=training, **changes)


def test_clips_of_other_data_are_not_replaced_without_a_word(tmp_path):
    cached_clips(small.config(clips=2, seconds=1.28), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_clips(small.config(clips=2, seconds=1.28), tmp_path)
    with pytest.warns(UserWarning, match="clips-train holds the clips of other data than scenes: they are replaced"):
        assert len(cached_clips(small.config(clips=3, seconds=1.28), tmp_path)) == 3


def test_data_is_opened_by_what_it_is(recordings, tmp_path):
    scenes = small.config(clips=7, seconds=1.28)
    assert isinstance(open_data(scenes), SoundScenes) and len(open_data(scenes)) == 7
    assert open_data(scenes, "test", size=3)[0]["waveform"].shape == (20_480,)
    folder = open_data(settings(recordings))
    assert isinstance(folder, CaptionedAudio) and len(folder) == 10 and folder[0]["caption"] == "bell 0"
    table = recordings / "table.csv"
    table.write_text('file,caption\nbell_1.wav,"a bell, rung once"\n')
    assert open_data(settings(table))[0]["caption"] == "a bell, rung once"
    root = tmp_path / "dataset_root.json"
    root.write_text(json.dumps({"bells": "recordings", "horns": "recordings", "metadata": {"path": {
        "bells": {"train": "train.json"}, "horns": {"train": "nowhere.json"}}}}))  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps({"data": [{"wav": "bell_2.wav", "caption": "a bell, far away"}]}))
    assert open_data(settings(root, data_sets=("bells",)))[0]["caption"] == "a bell, far away"
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        open_data(settings(tmp_path / "nowhere.csv"))
    with tarfile.open(tmp_path / "bells.tar", "w") as tar:
        tar.add(recordings / "bell_3.wav", "3.wav")
        tar.add(table, "3.txt")
    for shards in (tmp_path / "bells.tar", tmp_path / "*.tar", tmp_path):
        check_files(settings(shards), default_stages(settings(shards)), tmp_path / "run")
        assert open_data(settings(shards))[0]["id"] == "bells/3.wav"
    (tmp_path / "captions.csv").write_text("file,caption\nrecordings/bell_5.wav,a bell\n")
    assert open_data(settings(tmp_path))[0]["id"] == "recordings/bell_5.wav"
    with pytest.raises(FileNotFoundError, match="no recordings at .*horns"):
        check_files(settings(tmp_path / "horns*.tar"), ["vae"], tmp_path / "run")


@pytest.fixture(scope="module")
def without_unet(tmp_path_factory):
    """The settings and the folder of a run with every stage but the U-Net."""
    folder = tmp_path_factory.mktemp("stages")
    # A Gaussian of 32 numbers takes more than 32 blocks of four frames: ten clips of 1.28 s have eighty.
    config = settings(record(folder / "recordings"), seconds=1.28)
    with pytest.MonkeyPatch.context() as patch:
        small.use_small_clap(patch)
        for stage in ("vae", "clap", "hifigan"):
            steps = train_stage(RefinedAudioLDM(config, seed=4), stage, folder / "run")
            assert [s.index for s in steps] == [1, 2]
    return config, folder / "run"


@pytest.mark.parametrize("parameterization", ["v", "gaussian", "caption-gaussian"])
def test_all_stages_feed_each_other_and_the_result_is_a_model(without_unet, tmp_path, monkeypatch, parameterization):
    small.use_small_clap(monkeypatch)
    config, run = replace(without_unet[0], parameterization=parameterization), tmp_path / "run"
    assert set(default_stages(config)) == {"vae", "clap", "ldm", "hifigan"}
    shutil.copytree(without_unet[1], run)
    assert [s.index for s in train_stage(RefinedAudioLDM(config, seed=4), "ldm", run)] == [1, 2]
    files = {p.name for p in run.iterdir()}
    assert files == {
        "checkpoints", "clips-train", "latents-train", "embeddings-train", "discriminators", "config.yaml",
        "vae.safetensors", "ldm.safetensors", "hifigan.safetensors", "clap-tiny-gpt2.safetensors",
    }  # fmt: skip
    loaded = RefinedAudioLDM.load(run)
    assert loaded.config == config and loaded.scale != 1
    assert loaded.generate(["bell"]).shape == (1, 20_480)
    # The U-Net learned from the trained VAE, not from the fresh one it was made with.
    fresh = RefinedAudioLDM(config, seed=4)
    name = "encoder.conv_in.weight"
    assert not torch.equal(loaded.vae.state_dict()[name], fresh.vae.state_dict()[name])


def test_sounds_condition_the_unet_in_their_share(recordings, tmp_path):
    config, run = settings(recordings), tmp_path / "run"
    half = replace(config, training=config.training | {"ldm": replace(config.training["ldm"], audio_share=0.5)})
    for stage in ("vae", "clap"):
        list(train_stage(RefinedAudioLDM(half), stage, run))
    losses = [step.loss for step in train_stage(RefinedAudioLDM(half), "ldm", run)]
    sounds = Cached(run / "sounds-train").arrays["audio_embedding"]
    assert sounds.shape == (10, 12) and np.allclose(np.linalg.norm(sounds, axis=1), 1, atol=1e-2)
    shutil.rmtree(run / "checkpoints" / "ldm"), (run / "ldm.safetensors").unlink()
    assert losses != [step.loss for step in train_stage(RefinedAudioLDM(config), "ldm", run)]


def test_clips_are_resampled_as_they_are_loaded_for_a_conditioner_of_another_rate(recordings, tmp_path, monkeypatch):
    monkeypatch.setitem(CLAP_PRESETS, "tiny-gpt2", replace(small.CLAP, sample_rate=22_050))
    rates = lambda model, batches, **run: next(iter(batches))["sample_rate"]  # noqa: E731 in place of the training
    monkeypatch.setattr("refined_ldm.training.pipeline.train_clap", rates)
    assert list(train_stage(RefinedAudioLDM(settings(recordings)), "clap", tmp_path / "run")) == [22_050] * 4


def test_latents_have_unit_variance_and_follow_the_vae(recordings, tmp_path):
    model, calls = RefinedAudioLDM(settings(recordings)), []
    clips = cached_clips(model.config, tmp_path)

    def prepare():
        calls.clear()
        return prepare_latents(model, clips, tmp_path, on_clips=lambda *progress: calls.append(progress))

    latents = prepare()
    assert calls == [(10, 10)] and len(latents) == 10
    all_latents = torch.stack([latents[i]["latent"] for i in range(10)])
    assert all_latents.shape == (10, 2, 8, 4) and abs((model.scale * all_latents).std() - 1) < 0.01
    with torch.no_grad():
        expected = model.vae.encode(model.mel(clips[2]["waveform"][None])).mean[0]
        torch.testing.assert_close(latents[2]["latent"], expected, atol=2e-3, rtol=2e-3)  # kept in half precision
        expected = model.clap.embed_text(clips[2]["captions"])
        torch.testing.assert_close(latents[2]["embeddings"], expected, atol=1e-3, rtol=0)
    prepare()
    assert calls == []  # taken from disk
    model.vae.encoder.conv_in.weight.data += 1
    prepare()
    assert calls == [(10, 10)]  # another VAE, other latents


def test_the_linear_denoiser_is_fitted_to_the_scaled_latents(recordings, tmp_path):
    model = RefinedAudioLDM(settings(recordings, parameterization="gaussian", seconds=1.28))
    latents = prepare_latents(model, cached_clips(model.config, tmp_path), tmp_path)
    scaled = model.scale * torch.stack([latents[i]["latent"] for i in range(10)])
    power = (model.gaussian.variance + model.gaussian.mean**2).mean()  # of one number of a latent
    torch.testing.assert_close(power, (scaled**2).mean(), rtol=0.01, atol=0)


def test_clips_are_decoded_once(recordings, tmp_path):
    calls = []
    config = settings(recordings)
    clips = cached_clips(config, tmp_path, on_clips=lambda *progress: calls.append(progress))
    torch.testing.assert_close(clips[4]["waveform"], open_data(config)[4]["waveform"], atol=1 / 32767, rtol=0)
    again = cached_clips(config, tmp_path, on_clips=lambda *progress: calls.append(progress))
    assert calls == [(10, 10)] and torch.equal(again[4]["waveform"], clips[4]["waveform"])
    assert len(cached_clips(settings(recordings, seconds=0.64), tmp_path)[0]["waveform"]) == 10_240


def test_a_damaged_cache_is_made_again(recordings, tmp_path):
    config = settings(recordings)
    before = cached_clips(config, tmp_path)[3]["waveform"].clone()
    for path in sorted((tmp_path / "clips-train").iterdir()):
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.warns(UserWarning, match="clips-train is damaged .*: it is made again"):
            assert torch.equal(cached_clips(config, tmp_path)[3]["waveform"], before)


def test_another_sound_under_the_same_name_is_decoded_again(recordings, tmp_path):
    config = settings(recordings)
    before = cached_clips(config, tmp_path)[1]["waveform"].clone()
    save_audio(recordings / "bell_1.wav", small.clips(10)[7]["waveform"])
    assert not torch.equal(cached_clips(config, tmp_path)[1]["waveform"], before)


def test_recordings_that_cannot_be_used_are_left_out_counted_and_listed(recordings, tmp_path, capsys):
    (recordings / "bell_2.wav").write_bytes((recordings / "bell_2.wav").read_bytes()[:900])
    rows = [f"bell_{i}.wav,bell {i}" for i in range(10)] + ["../secret.wav,Out", "bell_1.wav,"]
    (recordings / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    settings(recordings).save(tmp_path / "c.yaml")
    command = ["train", "-c", tmp_path / "c.yaml", "--stage", "vae", "--run", tmp_path / "run", "--device", "cpu"]
    command = [str(word) for word in command]
    assert cli.main(command) == 2
    assert "2 faulty entries" in capsys.readouterr().err
    (recordings / "captions.csv").write_text("\n".join(["file,caption", *rows[:10]]))
    assert cli.main(command) == 2
    assert "captions.csv, line 4: " in (printed := capsys.readouterr().err) and "bell_2.wav: truncated" in printed
    assert not (tmp_path / "run" / "clips-train").exists()
    (recordings / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    with pytest.warns(UserWarning, match="3 faulty entries"):
        assert cli.main([*command, "--skip-bad"]) == 0
    listed = tmp_path / "run" / "left-out.txt"
    assert f"3 recordings or rows were left out: {listed} says which" in capsys.readouterr().out
    places = [line.split(":")[0] for line in listed.read_text().splitlines()]
    assert places == ["line 12", "line 13", "captions.csv, line 4"]
    clips = cached_clips(settings(recordings), tmp_path / "other", skip_bad=True)
    assert [item["id"] for item in clips.rest] == [f"bell_{i}.wav" for i in range(10) if i != 2]


def test_untrained_words_share_one_embedding(recordings, tmp_path):
    model = RefinedAudioLDM(settings(recordings))
    list(train_stage(model, "clap", tmp_path / "run"))
    with torch.no_grad():
        unseen, seen = model.clap.embed_text(["zebra", "piano"]), model.clap.embed_text(["bell 1", "bell 2"])
    assert (seen[0] - seen[1]).abs().max() > 1e-4
    table = model.clap.text.token_table.weight
    assert len(table.unique(dim=0)) < 40 and unseen.isfinite().all()


def test_stages_in_the_wrong_order_or_unknown_are_refused(recordings, tmp_path):
    model = RefinedAudioLDM(settings(recordings))
    with pytest.raises(
        ValueError, match="no stage 'unet': choose from vae, clap, details-text, details-audio, ldm, hifigan"
    ):
        next(train_stage(model, "unet", tmp_path))
    with pytest.raises(FileNotFoundError, match="vae.safetensors"):
        next(train_stage(model, "ldm", tmp_path / "empty"))


def test_all_that_is_fresh_comes_from_the_seed(recordings, tmp_path):
    def losses(name, seed=0):
        steps = train_stage(RefinedAudioLDM(settings(recordings)), "hifigan", tmp_path / name, seed=seed)
        return [step.losses["discriminators/loss"] for step in steps]

    torch.manual_seed(1)
    first = losses("a")
    torch.manual_seed(2)  # what the process drew before does not matter
    assert losses("b") == first and losses("c", seed=1) != first


def test_a_stage_goes_on_where_it_stopped(recordings, tmp_path):
    config = settings(recordings)
    config.training["vae"] = replace(small.STAGE, max_steps=4, save_every=2)
    steps = train_stage(RefinedAudioLDM(config), "vae", tmp_path)
    assert next(steps).index == 1 and next(steps).index == 2
    steps.close()
    assert not (tmp_path / "vae.safetensors").exists()  # it is not finished
    assert [s.index for s in train_stage(RefinedAudioLDM(config), "vae", tmp_path, resume=True)] == [3, 4]
    assert (tmp_path / "vae.safetensors").is_file()


# --- parts from files that the configuration names ---


@pytest.fixture
def donor(recordings, tmp_path):
    """A model whose parts lie in files as AudioLDM writes them: audioldm.ckpt, vae.ckpt, vae_vocoder.ckpt; and clap."""
    model = small.awake(RefinedAudioLDM(settings(recordings), seed=9))
    published_yaml.checkpoint(tmp_path / "audioldm.ckpt", model)
    published_yaml.first_stage(tmp_path / "vae.ckpt", model)
    published_yaml.first_stage(tmp_path / "vae_vocoder.ckpt", model, vocoder=True)
    model.clap.save(tmp_path / "clap.safetensors")
    return model


def same(module, other):
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("named, parts", [
    ({}, set()),
    ({"vae_checkpoint": "vae.ckpt"}, {"vae"}),
    ({"vae_checkpoint": "vae_vocoder.ckpt"}, {"vae", "hifigan"}),
    ({"vae_checkpoint": "audioldm.ckpt"}, {"vae", "hifigan"}),
    ({"vae_checkpoint": "vae.ckpt", "vocoder_checkpoint": "vae_vocoder.ckpt"}, {"vae", "hifigan"}),
    ({"clap_checkpoint": "clap.safetensors"}, {"clap"}),
    ({"start_from": "audioldm.ckpt", "vae_checkpoint": "nowhere.ckpt"}, {"ldm", "vae", "hifigan", "scale"}),
    ({"start_from": "audioldm.ckpt", "clap_checkpoint": "clap.safetensors"},
     {"ldm", "vae", "hifigan", "clap", "scale"}),
])  # fmt: skip
def test_what_named_files_hold_is_read(donor, tmp_path, named, parts):
    model = RefinedAudioLDM(donor.config.changed(**{name: str(tmp_path / file) for name, file in named.items()}))
    assert load_named_parts(model) == parts
    modules = {"vae": "vae", "hifigan": "vocoder", "clap": "clap", "ldm": "unet"}
    assert {part for part, name in modules.items() if same(getattr(model, name), getattr(donor, name))} == (
        parts - {"scale"})  # fmt: skip
    assert model.scale == (torch.tensor(0.7) if "scale" in parts else 1)
    assert load_named_parts(RefinedAudioLDM(model.config), {"clap"}) == parts & {"clap"}


def test_the_vocoder_is_looked_for_beside_the_first_stage(donor, tmp_path):
    model = RefinedAudioLDM(donor.config.changed(vae_checkpoint=str(tmp_path / "vae.ckpt")))
    torch.save({"generator": donor.vocoder.state_dict()}, tmp_path / "hifigan_16k_64bins.ckpt")
    assert load_named_parts(model) == {"vae", "hifigan"} and same(model.vocoder, donor.vocoder)


def test_a_unet_of_another_conditioner_keeps_all_but_the_layer_captions_enter_by(donor, tmp_path):
    fresh = RefinedAudioLDM(donor.config.changed(start_from=str(tmp_path / "other.ckpt")))
    before = {name: tensor.clone() for name, tensor in fresh.unet.state_dict().items()}
    donor.unet = small.awake(UNet(replace(donor.config.unet, embedding_dim=20)))
    published_yaml.checkpoint(tmp_path / "other.ckpt", donor)
    assert load_named_parts(fresh) == {"vae", "hifigan", "scale"}
    for name, tensor in fresh.unet.state_dict().items():
        assert torch.equal(tensor, before[name] if "film_embed" in name else donor.unet.state_dict()[name]), name
    fresh.config = fresh.config.changed(clap_checkpoint=str(tmp_path / "clap.safetensors"))
    with pytest.warns(UserWarning, match="was trained with another conditioner than tiny-gpt2"):
        next(train_stage(fresh, "ldm", tmp_path / "run"))


@pytest.mark.parametrize("named, error, message", [
    ({"start_from": "no.ckpt"}, FileNotFoundError, r"start_from \(reload_from_ckpt in AudioLDM's YAML\) is no.ckpt"),
    ({"vae_checkpoint": "no.ckpt"}, FileNotFoundError, "first_stage_config.params.reload_from_ckpt.*--stage vae ldm"),
    ({"vae_checkpoint": "a/vae_mel_16k_64bins.ckpt"}, FileNotFoundError, "it is published at https://zenodo"),
    ({"clap_checkpoint": "no.pth"}, FileNotFoundError, "name it where it is, with --clap-checkpoint"),
    ({"vocoder_checkpoint": "no.ckpt"}, FileNotFoundError, "vocoder_checkpoint .* is no.ckpt, which is not there"),
    ({"start_from": "VAE"}, ValueError, "vae.ckpt holds no unet, only vae"),
    ({"vocoder_checkpoint": "VAE"}, ValueError, "vae.ckpt holds no hifigan, only vae"),
])  # fmt: skip
def test_a_file_that_is_missing_or_another_is_named(donor, tmp_path, named, error, message):
    named = {setting: path.replace("VAE", str(tmp_path / "vae.ckpt")) for setting, path in named.items()}
    with pytest.raises(error, match=message):
        load_named_parts(RefinedAudioLDM(donor.config.changed(**named)))


def test_a_file_of_other_sizes_is_refused(donor, tmp_path):
    wider = donor.config.changed(vae=replace(donor.config.vae, channels=16), vae_checkpoint=str(tmp_path / "vae.ckpt"))
    with pytest.raises(ValueError, match="vae.ckpt does not fit MelVAE: .* of another shape"):
        load_named_parts(RefinedAudioLDM(wider))


def test_files_are_missed_before_a_model_is_built(donor, tmp_path):
    config = donor.config.changed(vae_checkpoint="no.ckpt")
    for stages in (["ldm"], ["vae", "ldm"]):
        with pytest.raises(FileNotFoundError, match="vae_checkpoint"):
            check_files(config, stages, tmp_path / "run")
    check_files(config, ["clap", "hifigan"], tmp_path / "run")
    for part in ("vae", "clap"):
        donor.save_part(part, tmp_path / "run")
    check_files(config, ["ldm"], tmp_path / "run")  # the run has its own
    with pytest.raises(FileNotFoundError, match="no recordings at gone.csv"):
        check_files(config.changed(data="gone.csv"), ["ldm"], tmp_path / "run")


def test_what_has_no_file_is_trained(donor):
    config = donor.config.changed(data="scenes")
    assert default_stages(config) == STAGES
    assert default_stages(config.changed(data="a.csv")) == ("vae", "clap", "ldm", "hifigan")
    assert default_stages(config.changed(clap_checkpoint="a")) == ("vae", "ldm")
    assert default_stages(config.changed(vae_checkpoint="a")) == ("ldm",)
    assert default_stages(config.changed(start_from="a")) == ("ldm",)


def test_the_unet_learns_from_published_parts_alone_and_the_run_is_a_model(donor, tmp_path):
    config = donor.config.changed(vae_checkpoint=str(tmp_path / "vae.ckpt"),
                                  clap_checkpoint=str(tmp_path / "clap.safetensors"))  # fmt: skip
    run = tmp_path / "run"
    assert [step.index for step in train_stage(RefinedAudioLDM(config), "ldm", run)] == [1, 2]
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "clips-train", "latents-train", "embeddings-train", "config.yaml", "vae.safetensors",
        "ldm.safetensors",
    }  # fmt: skip
    loaded = RefinedAudioLDM.load(run)  # the conditioner stays where it is, and no file has a vocoder
    assert loaded.config == config.changed(vocoder="griffin_lim")
    assert same(loaded.vae, donor.vae) and same(loaded.clap, donor.clap) and loaded.scale not in (0.7, 1)
    assert loaded.generate(["bell"]).shape == (1, 5120)
    list(train_stage(RefinedAudioLDM(config), "hifigan", run))
    assert RefinedAudioLDM.load(run).config.vocoder == "hifigan"


def test_a_checkpoint_starts_the_unet_with_its_own_scale_and_first_stage(donor, tmp_path):
    config = donor.config.changed(start_from=str(tmp_path / "audioldm.ckpt"), vae_checkpoint="not needed",
                                  clap_checkpoint=str(tmp_path / "clap.safetensors"))  # fmt: skip
    run = tmp_path / "run"
    steps = train_stage(model := RefinedAudioLDM(config), "ldm", run, lr=1e-12)
    next(steps), steps.close()
    assert torch.allclose(model.unet.conv_out.weight, donor.unet.conv_out.weight, atol=1e-6)
    resumed = list(train_stage(RefinedAudioLDM(config), "ldm", run, lr=1e-12, resume=True))
    assert resumed[-1].index == 2
    loaded = RefinedAudioLDM.load(run)
    assert loaded.scale == torch.tensor(0.7)  # kept when the run went on, too
    assert same(loaded.vae, donor.vae) and same(loaded.vocoder, donor.vocoder)
    (tmp_path / "audioldm.ckpt").unlink()  # what goes on needs it no more
    check_files(config, ["ldm"], run, resume=True)
    assert [s.index for s in train_stage(RefinedAudioLDM(config), "ldm", run, resume=True, max_steps=3)] == [3]
    with pytest.raises(FileNotFoundError, match="start_from"):
        check_files(config, ["ldm"], run)


def test_what_the_run_has_trained_goes_before_the_files(donor, tmp_path):
    config = donor.config.changed(vae_checkpoint=str(tmp_path / "vae.ckpt"),
                                  clap_checkpoint=str(tmp_path / "clap.safetensors"))  # fmt: skip
    run = tmp_path / "run"
    list(train_stage(RefinedAudioLDM(config), "vae", run, lr=1e-12))
    trained = RefinedAudioLDM(config)
    trained.load_part("vae", run)
    weights = [module.encoder.conv_in.weight for module in (trained.vae, donor.vae)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)  # it started from the file
    small_change = trained.vae.encoder.conv_in.weight.data.add_(0.25).clone()
    trained.save_part("vae", run)
    (tmp_path / "vae.ckpt").unlink()
    list(train_stage(RefinedAudioLDM(config), "ldm", run))
    assert torch.equal(RefinedAudioLDM.load(run).vae.encoder.conv_in.weight, small_change)


def test_discriminators_are_kept_and_go_on_with_their_vocoder(recordings, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model = RefinedAudioLDM(settings(recordings))
    list(train_stage(model, "hifigan", first))
    discriminators, _ = read_weights(first / "discriminators/hifigan.safetensors")
    other = RefinedAudioLDM(settings(recordings, vocoder_checkpoint=str(first / "hifigan.safetensors")), seed=5)
    list(train_stage(other, "hifigan", second, max_steps=1, lr=1e-9))  # which changes next to nothing
    for name, value in model.vocoder.state_dict().items():
        torch.testing.assert_close(other.vocoder.state_dict()[name], value, atol=1e-6, rtol=0)
    found, _ = read_weights(second / "discriminators/hifigan.safetensors")
    for name in (
        name for name in discriminators if not name.endswith(("_u", "_v", ".0._u", ".0._v"))
    ):  # spectral norm's own
        torch.testing.assert_close(found[name], discriminators[name], atol=1e-5, rtol=1e-5)
    list(train_stage(RefinedAudioLDM(settings(recordings)), "hifigan", tmp_path / "third", adversarial=False))
    assert not (tmp_path / "third" / "discriminators/hifigan.safetensors").exists()


def test_a_vae_has_a_discriminator_if_it_is_to_weigh_something(recordings, tmp_path):
    list(train_stage(RefinedAudioLDM(settings(recordings)), "vae", tmp_path / "alone"))
    assert not (tmp_path / "alone" / "discriminators/vae.safetensors").exists()
    config, vae = settings(recordings), replace(small.STAGE, adversarial_weight=0.1, disc_start=2)
    config = replace(config, vae_discriminator=PatchDiscriminatorConfig(8, 2), training={**config.training, "vae": vae})
    steps = list(train_stage(RefinedAudioLDM(config), "vae", tmp_path / "adversarial"))
    assert [step.losses["patches/loss"] > 0 for step in steps] == [False] * 2 + [True] * 4
    assert (tmp_path / "adversarial" / "discriminators/vae.safetensors").is_file()


def test_a_vocoder_learns_from_the_vae_of_its_run(recordings, tmp_path):
    config = settings(recordings)
    learns = replace(small.STAGE, vae_mels=True, crop_frames=16)
    config = replace(config, training={**config.training, "hifigan": learns})
    with pytest.raises(FileNotFoundError, match="vae.safetensors"):
        list(train_stage(RefinedAudioLDM(config), "hifigan", tmp_path / "run"))
    list(train_stage(RefinedAudioLDM(config), "vae", tmp_path / "run"))
    model = RefinedAudioLDM(config, seed=3)
    assert len(list(train_stage(model, "hifigan", tmp_path / "run"))) == 6
    trained, _ = read_weights(tmp_path / "run" / "vae.safetensors")
    assert all(torch.equal(model.vae.state_dict()[name], value) for name, value in trained.items())


# --- what is finished stays, and what can be known is known before ---


def digests(run):
    return {path.name: path.read_bytes() for path in run.glob("*.*")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_part_is_not_replaced(donor, tmp_path, stage, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(donor.clap, "stages", tuple(DETAILS))
    donor.save(run)  # a whole run, whose checkpoints were removed to save disk
    before, stage_named = digests(run), stage if stage in DETAILS else f"{stage}.*is there already"
    config = donor.config.changed(data="scenes") if stage in DETAILS else donor.config
    with pytest.raises(FileExistsError, match="is there already, finished.*: give another --run") as refusal:
        list(train_stage(RefinedAudioLDM(config), stage, run))
    assert re.search(stage_named, str(refusal.value))
    with pytest.raises(FileExistsError, match="is there already, finished"):
        check_run(donor.config, STAGES if stage == "vae" else [stage], run)
    check_run(donor.config, [stage], run, resume=True)
    assert list(train_stage(RefinedAudioLDM(config), stage, run, resume=True)) == []
    assert digests(run) == before and not (run / "clips-train").exists()


def test_a_finished_part_stays_though_all_its_checkpoints_are_damaged(recordings, tmp_path):
    run = tmp_path / "run"
    list(train_stage(RefinedAudioLDM(settings(recordings)), "vae", run))
    before = digests(run)
    for path in (run / "checkpoints" / "vae").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert list(train_stage(RefinedAudioLDM(settings(recordings), seed=5), "vae", run, resume=True, max_steps=3)) == []
    assert digests(run) == before


@pytest.mark.parametrize("finished, changes, message", [
    ("ldm", {"parameterization": "eps"}, r"parameterization eps \(the run: v\)"),
    ("ldm", {"beta_end": 0.02}, "beta_end"),
    ("vae", {"mel": replace(small.config().mel, fmax=4000.0)}, "mel.fmax"),
    ("hifigan", {"mel": replace(small.config().mel, fmin=50.0)}, "mel.fmin"),
])  # fmt: skip
def test_the_settings_of_a_finished_part_are_not_replaced(donor, tmp_path, finished, changes, message):
    run, stage = tmp_path / "run", "clap"
    donor.save_part(finished, run)
    donor.config.save(run / "config.yaml")
    check_run(donor.config, [stage], run)
    with pytest.raises(ValueError, match=f"not those of the finished {finished} in .*{message}.*another --run"):
        check_run(donor.config.changed(**changes), [stage], run)
    check_run(donor.config.changed(steps=7), [stage], run)  # which no weights depend on


def test_an_attempt_that_saved_nothing_goes_on_and_a_mistyped_run_does_not(recordings, tmp_path):
    config = settings(recordings)
    (tmp_path / "empty").mkdir()
    check_run(config, STAGES, tmp_path / "empty", resume=True)
    for place in ("mistyped", "recordings"):
        with pytest.raises(FileNotFoundError, match=f"no run at .*{place} that could go on"):
            check_run(config, STAGES, tmp_path / place, resume=True)


def test_what_a_later_stage_lacks_is_reported_before_the_first(recordings, tmp_path):
    config = settings(recordings)
    with pytest.raises(FileNotFoundError, match="no weights at .*vae.safetensors to learn.*--stage vae clap ldm"):
        check_files(config, ["clap", "ldm"], tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="the U-Net needs a conditioner: .*--stage clap ldm"):
        check_files(config, ["vae", "ldm"], tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="the U-Net needs a conditioner: .*CLAP_weights_2023.pth"):
        check_files(config.changed(clap="ms-clap-2023"), ["vae", "ldm"], tmp_path / "run")
    learns = replace(config, training={**config.training, "hifigan": replace(small.STAGE, vae_mels=True)})
    with pytest.raises(FileNotFoundError, match="no weights at .*vae.safetensors to learn from"):
        check_files(learns, ["clap", "hifigan"], tmp_path / "run")
    check_files(learns, default_stages(learns), tmp_path / "run")


@pytest.mark.parametrize("count", [1, 3])
def test_few_clips_train_all_stages(tmp_path, monkeypatch, count):
    """One clip of 0.32 s has two blocks of the 32 numbers whose covariance the linear denoiser knows."""
    small.use_small_clap(monkeypatch)
    for i, item in enumerate(small.clips(count)):
        save_audio(tmp_path / "recordings" / f"bell_{i}.wav", item["waveform"])
    config = settings(tmp_path / "recordings", more_captions=3)

    def train(stage, run, parameterization="v"):
        model = RefinedAudioLDM(replace(config, parameterization=parameterization), seed=4)
        steps = list(train_stage(model, stage, run))
        assert [s.index for s in steps] == [1, 2]
        assert all(0 <= s.loss < {"ldm": 5, "hifigan": 1000}.get(stage, 100) for s in steps), stage

    for stage in ("vae", "clap", "hifigan"):
        train(stage, tmp_path / "run")
    for parameterization in ("gaussian", "caption-gaussian"):
        run = shutil.copytree(tmp_path / "run", tmp_path / parameterization)
        train("ldm", run, parameterization)
        sound = RefinedAudioLDM.load(run).generate(["bell 0"], steps=3)
        assert sound.shape == (1, 5120) and sound.isfinite().all()


@pytest.mark.parametrize("stage", DETAILS)
def test_details_of_recordings_are_refused_before_the_stages_that_come_first(recordings, tmp_path, stage):
    settings(recordings).save(tmp_path / "c.yaml")
    words = ["train", "-c", tmp_path / "c.yaml", "--stage", "vae", stage, "--run", tmp_path / "run", "--device", "cpu"]
    with pytest.raises(ValueError, match=f"{stage} is trained on the generated captions of data 'scenes' only, got .*"):
        check_files(settings(recordings), ["vae", stage], tmp_path / "run")
    assert cli.main([str(word) for word in words]) == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting, message", [
    ("vae_checkpoint", "the vae.safetensors in it"), ("clap_checkpoint", "clap-….safetensors in it"),
])  # fmt: skip
def test_a_run_in_place_of_a_published_file_is_named_in_the_error(donor, tmp_path, setting, message):
    donor.config.save(tmp_path / "other" / "config.yaml")
    with pytest.raises(ValueError, match=f"{setting} is .*other, the folder of a run: give .*{message}"):
        check_files(donor.config.changed(**{setting: str(tmp_path / "other")}), ["vae", "ldm"], tmp_path / "run")


def test_a_new_run_starts_from_a_model_of_ours(donor, tmp_path):
    donor.save(tmp_path / "model")
    config = donor.config.changed(start_from=str(tmp_path / "model"))
    check_files(config, ["ldm"], tmp_path / "run")
    steps = list(train_stage(RefinedAudioLDM(config, seed=9), "ldm", tmp_path / "run"))
    loaded = RefinedAudioLDM.load(tmp_path / "run")
    assert [s.index for s in steps] == [1, 2] and same(loaded.vae, donor.vae) and same(loaded.clap, donor.clap)
    before = dict(donor.unet.named_parameters())
    moved = [
        float((after - before[name]).abs().max())
        for name, after in loaded.unet.named_parameters()
        if not name.startswith("film_embed")  # fitted anew, so that captions mean what they meant
    ]
    assert 0 < max(moved) < 0.01  # two steps away from where it started


def test_a_new_caption_map_is_fitted_before_the_unet_is_trained(donor, tmp_path):
    """From the weights of a model without a map, which stay as they are."""
    donor.save(tmp_path / "model")
    config = donor.config.changed(start_from=str(tmp_path / "model"), unet=replace(donor.config.unet, caption_map=3))
    model = RefinedAudioLDM(config, seed=9)
    steps = train_stage(model, "ldm", tmp_path / "run", lr=1e-12)
    next(steps), steps.close()
    torch.testing.assert_close(model.unet.conv_out.weight, donor.unet.conv_out.weight, atol=1e-6, rtol=0)
    clips = encode_clips(model, cached_clips(config, tmp_path / "run"), tmp_path / "run")
    items = [clips[i] for i in range(len(clips))]
    latents = torch.stack([item["latent"] for item in items]) * model.latent_scale
    embeddings = model.clap.embed_text([item["captions"][-1] for item in items]).detach()
    fitted = CaptionMap(embeddings.shape[1], latents.shape[1], 3).fit(latents, embeddings)
    with torch.no_grad():  # not the weights: the signs of the directions, and equal directions, are arbitrary
        drawn = [of(embeddings, *latents.shape[2:]) for of in (model.unet.caption_map, fitted)]
    torch.testing.assert_close(*drawn, atol=0.01 * float(drawn[1].std()), rtol=0)
    assert drawn[1].std() > 0.1 * latents.std()
    resumed = RefinedAudioLDM(config, seed=9)
    list(train_stage(resumed, "ldm", tmp_path / "run", lr=1e-12, resume=True))
    assert torch.equal(
        RefinedAudioLDM.load(tmp_path / "run").unet.caption_map.draw.bias, resumed.unet.caption_map.draw.bias
    )
    other = donor.config.changed(start_from=str(tmp_path / "run"), unet=replace(donor.config.unet, caption_map=5))
    with pytest.raises(ValueError, match="does not fit UNet: .* of another shape"):
        next(train_stage(RefinedAudioLDM(other), "ldm", tmp_path / "third"))
