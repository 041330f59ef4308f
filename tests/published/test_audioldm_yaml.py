"""AudioLDM's training YAML is read as published: every key is honoured, or fixed, or known to mean nothing here."""

import sys
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refined_ldm.config import load_config, preset
from refined_ldm.published.audioldm_yaml import ONLY, convert_config, is_published
from tests.support import published_yaml
from tests.support.published_yaml import FILM, FIRST, REMOVED, SMALL, UNET, tree

DD = FIRST + "ddconfig."
RATES = ("preprocessing.audio.sampling_rate", "model.params.sampling_rate", FIRST + "sampling_rate")
EVALUATION = "model.params.evaluation_params."


def load(tmp_path, changes=None):
    return load_config(published_yaml.write(tmp_path / "some.yaml", changes))


def test_the_seeds_file_is_the_paper_with_its_own_training(tmp_path):
    (tmp_path / "audioldm_custom.yaml").write_text(published_yaml.CUSTOM)
    config, paper = load_config(tmp_path / "audioldm_custom.yaml"), preset("paper")
    assert (config.name, config.clap) == ("audioldm_custom", "ms-clap-2023")
    for part in ("mel", "vae", "hifigan", "diffusion_steps", "beta_start", "beta_end", "parameterization", "seconds",
                 "steps", "unconditional_probability"):  # fmt: skip
        assert getattr(config, part) == getattr(paper, part), part
    assert config.unet == replace(paper.unet, embedding_gain=32.0)  # MS-CLAP's embeddings were 32 long there
    assert (config.guidance_scale, config.candidates) == (3.5, 3)
    assert config.vae_checkpoint == "data/checkpoints/vae_mel_16k_64bins.ckpt"
    assert (config.data, config.data_sets) == ("./data/dataset/metadata/dataset_root.json", ("audiocaps",))
    assert config.clap_checkpoint == config.start_from == config.vocoder_checkpoint == ""
    for stage in map(config.training.get, ("vae", "clap", "ldm", "hifigan")):
        assert (stage.max_steps, stage.batch_size, stage.save_every) == (800_000, 2, 5000)
        assert (stage.lr_schedule, stage.warmup_steps) == ("constant", 2000)
    ldm = config.training["ldm"]
    assert (ldm.lr, ldm.ema_decay, ldm.betas) == (1e-4, 0.9999, (0.9, 0.999))
    assert (ldm.weight_decay, ldm.max_grad_norm) == (0.01, 0)
    assert config.training["vae"].lr == 8e-6
    config.save(tmp_path / "ours.yaml")
    assert load_config(tmp_path / "ours.yaml") == config


def test_the_baselines_file_names_laion_clap():
    settings = convert_config(published_yaml.original())
    assert (settings["clap"], settings["unet"]["embedding_dim"], settings["unet"]["embedding_gain"]) == (
        "laion-clap", 512, 1.0)  # fmt: skip
    assert settings["clap_checkpoint"] == "data/checkpoints/clap_music_speech_audioset_epoch_15_esc_89.98.pt"
    seeds = convert_config(tree())
    assert {k: v for k, v in settings.items() if k not in ("clap", "unet", "clap_checkpoint")} == {
        k: v for k, v in seeds.items() if k not in ("clap", "unet", "clap_checkpoint")}  # fmt: skip


HONOURED = [  # key, another value, what of the configuration it is, and its value there
    ("metadata_root", "other.json", lambda c: c.data, "other.json"),
    ("reload_from_ckpt", "audioldm-s-full.ckpt", lambda c: c.start_from, "audioldm-s-full.ckpt"),
    ("data.train", ["a", "b"], lambda c: c.data_sets, ("a", "b")),
    ("data.train", "a", lambda c: c.data_sets, ("a",)),
    ("step.max_steps", 7, lambda c: c.training["clap"].max_steps, 7),
    ("step.save_checkpoint_every_n_steps", 3, lambda c: c.training["ldm"].save_every, 3),
    ("preprocessing.audio.duration", 20, lambda c: c.seconds, 10.24),  # longer recordings are cut
    ("preprocessing.mel.mel_fmin", 50, lambda c: c.mel.fmin, 50.0),
    ("preprocessing.mel.mel_fmax", 7000, lambda c: c.mel.fmax, 7000.0),
    (FIRST + "reload_from_ckpt", "vae.ckpt", lambda c: c.vae_checkpoint, "vae.ckpt"),
    (FIRST + "reload_from_ckpt", None, lambda c: c.vae_checkpoint, ""),
    ("model.params.first_stage_config.base_learning_rate", "1e-5", lambda c: c.training["vae"].lr, 1e-5),
    (DD + "ch", 64, lambda c: c.vae.channels, 64),
    (DD + "num_res_blocks", 1, lambda c: c.vae.num_res_blocks, 1),
    ("model.params.base_learning_rate", 3.0e-4, lambda c: c.training["ldm"].lr, 3e-4),
    ("model.params.warmup_steps", 0, lambda c: c.training["ldm"].warmup_steps, 0),
    ("model.params.batchsize", 5, lambda c: c.training["vae"].batch_size, 5),
    ("model.params.linear_start", 0.001, lambda c: c.beta_start, 0.001),
    ("model.params.linear_end", 0.02, lambda c: c.beta_end, 0.02),
    ("model.params.timesteps", 500, lambda c: c.diffusion_steps, 500),
    ("model.params.unconditional_prob_cfg", 0.2, lambda c: c.unconditional_probability, 0.2),
    ("model.params.parameterization", "v", lambda c: c.parameterization, "v"),
    ("model.params.latent_t_size", 64, lambda c: c.seconds, 2.56),
    (UNET + "model_channels", 192, lambda c: c.unet.model_channels, 192),
    (UNET + "attention_resolutions", [8, 4], lambda c: c.unet.attention_resolutions, (8, 4)),
    (UNET + "num_res_blocks", 3, lambda c: c.unet.num_res_blocks, 3),
    (UNET + "channel_mult", [1, 2], lambda c: c.unet.channel_mult, (1, 2)),
    (UNET + "num_head_channels", 64, lambda c: c.unet.head_channels, 64),
    (FILM + "params.pretrained_path", "CLAP_weights_2023.pth", lambda c: c.clap_checkpoint, "CLAP_weights_2023.pth"),
    (EVALUATION + "unconditional_guidance_scale", 2, lambda c: c.guidance_scale, 2.0),
    (EVALUATION + "ddim_sampling_steps", 50, lambda c: c.steps, 50),
    (EVALUATION + "n_candidates_per_samples", 1, lambda c: c.candidates, 1),
]  # fmt: skip


@pytest.mark.parametrize("key, value, part, expected", HONOURED, ids=[row[0] for row in HONOURED])
def test_a_key_is_honoured(tmp_path, key, value, part, expected):
    assert part(load(tmp_path, {key: value})) == expected


def leaves(written, above=""):
    for name, value in written.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def test_every_published_key_is_known_and_none_beside_it():
    for key in leaves(tree()):
        if not key.startswith(("variables.", FIRST + "lossconfig")):  # sections of which nothing is read
            with pytest.raises(ValueError, match=f"unknown key {key}_$"):
                convert_config(tree({key + "_": 1}))


@pytest.mark.parametrize("key", [
    "log_directory", "project", "precision", "seed", "variables.mel_bins", "data.val", "data.test",
    "data.class_label_indices", "step.validation_every_n_epochs", "step.limit_val_batches", "step.save_top_k",
    "preprocessing.audio.max_wav_value", "model.params.monitor", "model.params.log_every_t",
    "model.params.scheduler_config.target", "model.params.scheduler_config.params.warm_up_steps",
    FIRST + "monitor", FIRST + "batchsize", FIRST + "lossconfig.params.kl_weight", DD + "resolution",
    UNET + "image_size", FILM + "params.sample_rate", FILM + "params.fmax", FILM + "params.classes_num",
    FILM + "params.amodel",
])  # fmt: skip
def test_a_key_without_meaning_here_may_say_anything(key):
    assert convert_config(tree({key: 987})) == convert_config(tree())


@pytest.mark.parametrize("key", ONLY)
def test_settings_with_a_single_value_are_named_in_the_error(key):
    convert_config(tree({key: ONLY[key]}))
    with pytest.raises(ValueError, match=f"{key} is 'other': here it can only be"):
        convert_config(tree({key: "other"}))


@pytest.mark.parametrize("changes, message", [
    ({"sekonds": 3}, "some.yaml: unknown key sekonds$"),
    ({"model.params.dropout": 0.1}, "unknown key model.params.dropout$"),
    ({"model.params.unet_config.params.deep.er": 1}, "unknown key model.params.unet_config.params.deep.er$"),
    ({"model.target": "os.system"}, "model.target is 'os.system': the only one known is …ddpm.LatentDiffusion"),
    ({"model.target": "latent_encoder.autoencoder.AutoencoderKL"}, "the only one known is …ddpm.LatentDiffusion"),
    ({"model.params.first_stage_config.target": "evilautoencoder.AutoencoderKL"}, "first_stage_config.target is 'evil"),
    ({"model.params.unet_config.target": "a.UNet"}, "unet_config.target is 'a.UNet': the only one known is …openai"),
    ({FILM + "target": "audioldm_train.conditional_models.FlanT5HiddenState"},
     "film_clap_cond1.target is .*FlanT5HiddenState': known are"),
    ({FILM + "target": "laion_clap.CLAP"}, "target is 'laion_clap.CLAP': known are"),
    ({FILM + "target": REMOVED}, "film_clap_cond1.target is missing"),
    ({FILM + "conditioning_key": "crossattn"}, "conditioning_key is 'crossattn': here it can only be 'film'"),
    ({FILM + "params.text_model": "bert"}, "text_model is 'bert'"),
    ({"model.params.cond_stage_config.second.target": "a"}, "must name one conditioner, got film_clap_cond1, second"),
    ({"model.params.cond_stage_config": {}}, "must name one conditioner, got none"),
    ({"data.dataloader_add_ons": ["extract_kaldi_fbank_feature"]}, r"may be \[\] or \[waveform_rs_48k\]"),
    ({"data.train": []}, r"data.train must be a name or a list of names, got \[\]"),
    ({"data.train": REMOVED}, "data.train must be a name or a list of names, got None"),
    ({"model.params.batchsize": REMOVED}, "model.params.batchsize is missing"),
    ({"model.params.batchsize": 0}, "model.params.batchsize must be a whole number from 1 on, got 0"),
    ({"model.params.batchsize": True}, "model.params.batchsize must be a whole number from 1 on, got True"),
    ({"model.params.base_learning_rate": "fast"}, "base_learning_rate must be a number, got 'fast'"),
    ({"model.params.base_learning_rate": -1}, "training.ldm: max_steps and lr must be positive"),
    ({"model.params.parameterization": "mu"}, "must be eps, v, x0, gaussian or caption-gaussian, got 'mu'"),
    ({UNET + "channel_mult": 3}, "channel_mult must be a list of whole numbers, got 3"),
    ({UNET + "channel_mult": []}, "channel_mult is empty"),
    ({UNET + "model_channels": 48}, "some.yaml: unet: level width 48 = 1 x model_channels 48 must divide by"),
    ({UNET + "num_head_channels": 48}, "must divide by norm_groups 32 and head_channels 48"),
    ({DD + "ch": 48}, "ddconfig.ch is 48: it must be a multiple of 32"),
    # what contradicts itself
    ({"model.params.latent_f_size": 32}, "latent_f_size is 32, but preprocessing.mel.n_mel_channels 64 / 4 .* is 16"),
    ({DD + "mel_bins": 80}, "n_mel_channels is 64, but .*ddconfig.mel_bins is 80: they must be equal"),
    ({DD + "ch_mult": [1, 2]}, "latent_f_size is 16, but .* 64 / 2 by the first stage is 32"),
    ({"preprocessing.stft.win_length": 800}, "filter_length is 1024, but preprocessing.stft.win_length is 800"),
    ({"preprocessing.stft.hop_length": 320, "preprocessing.audio.duration": 21}, "vocoder makes 160 .*, mel hops 320"),
    (dict.fromkeys(RATES, 48_000), "sampling_rate is 48000: recordings are read at 16000 Hz"),
    ({"model.params.sampling_rate": 8000}, "sampling_rate is 16000, but model.params.sampling_rate is 8000"),
    ({FIRST + "embed_dim": 4}, "model.params.channels is 8, but .*embed_dim is 4"),
    ({UNET + "in_channels": 9}, "model.params.channels is 8, but .*in_channels is 9"),
    ({UNET + "extra_film_condition_dim": 512}, "extra_film_condition_dim is 512, but ms-clap-2023 embeds in 1024"),
    ({FILM + "params.d_proj": 512}, "d_proj is 512, but ms-clap-2023 embeds in 1024"),
    ({"preprocessing.audio.duration": 5}, "duration is 5 s, shorter than the 10.24 s of .*latent_t_size 256"),
    ({"model.params.latent_t_size": 252}, "latent_t_size is 252: it must be a multiple of 8"),
    ({"preprocessing.mel.mel_fmax": 9000}, "some.yaml: mel: .*<= 8000"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, changes)


def test_no_target_is_imported(tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        for place in ("model.", "model.params.first_stage_config.", "model.params.unet_config.", FILM):
            with pytest.raises(ValueError, match="trap.Door"):
                convert_config(tree({place + "target": "trap.Door"}))
        prefixed = "trap.modules.latent_diffusion.ddpm.LatentDiffusion"
        assert convert_config(tree({"model.target": prefixed})) == convert_config(tree())
    finally:
        sys.path.remove(str(tmp_path))
    assert "trap" not in sys.modules


def test_other_places_of_the_known_parts_are_known_too():
    for target in ("msclap.models.clap.CLAP", "audioldm_train.modules.MSCLAP.msclap.models.clap2.CLAP"):
        assert convert_config(tree({FILM + "target": target}))["clap"] == "ms-clap-2023"


def test_a_shrunken_copy_is_small(tmp_path):
    config = load(tmp_path, SMALL)
    assert config.seconds == 0.64 and config.unet.downsampling == 2 and config.vae.channels == 32


def test_our_own_settings_are_not_taken_for_theirs():
    assert is_published(tree()) and not is_published({"preset": "tiny", "data": "scenes", "unet": {}})


ODD = st.sampled_from([None, True, 0, -1, 10**400, float("nan"), float("inf"), -1e308, "", "1e999", [], {}, [0], ["a"]])
VALUES = ODD | st.recursive(st.integers() | st.floats() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3)
                            | st.dictionaries(st.text(max_size=3), inner, max_size=3))  # fmt: skip


@settings(deadline=2000, max_examples=60)
@example("preprocessing.audio.duration", float("inf"))
@example("data.dataloader_add_ons", 1)
@example("model.params.latent_t_size", 10**400)
@example("model.params.base_learning_rate", 10**400)
@given(st.sampled_from(sorted(leaves(tree()))), VALUES)
def test_any_value_of_a_published_key_is_followed_or_refused(tmp_path_factory, key, value):
    try:
        load(tmp_path_factory.getbasetemp(), {key: value})
    except ValueError as fault:
        assert "some.yaml" in str(fault)
