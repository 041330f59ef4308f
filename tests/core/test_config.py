from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refined_ldm.config import PRESETS, STAGES, Config, StageConfig, load_config, preset
from refined_ldm.mel import MelConfig
from refined_ldm.vae import VAEConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_survive_yaml(name, tmp_path):
    config = preset(name)
    assert config.name == name and set(config.training) == {*STAGES, "distill"}
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "!!" not in (tmp_path / "config.yaml").read_text()  # plain YAML that any reader reads
    with pytest.raises(FrozenInstanceError):
        config.seconds = 1.0


def test_published_settings():
    paper, baseline = preset("paper"), preset("baseline")
    assert (paper.clap, paper.unet.embedding_dim) == ("ms-clap-2023", 1024)
    assert (baseline.clap, baseline.unet.embedding_dim) == ("laion-clap", 512)
    for config in (paper, baseline):
        assert config.samples == 163_840 and config.samples // config.mel.hop_length == 1024
        assert (config.beta_start, config.beta_end, config.diffusion_steps) == (0.0015, 0.0195, 1000)
        assert config.unet.channel_mult == (1, 2, 3, 5) and config.vae.channel_mult == (1, 2, 4)


def test_preset_takes_changes_and_refuses_unknown_ones():
    assert preset("tiny", steps=50, seconds=5.12) == replace(preset("tiny"), steps=50, seconds=5.12)
    with pytest.raises(ValueError, match="no preset 'huge': choose one of tiny"):
        preset("huge")
    with pytest.raises(ValueError, match="no setting stepz"):
        preset("tiny", stepz=50)


def test_sizes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match=r"16000 samples, not a whole number of 5120 .*: take 0.96"):
        preset("tiny", seconds=1.0)
    assert preset("tiny", seconds=0.96).samples == 15_360  # what the message says works
    with pytest.raises(ValueError, match="vocoder makes 160 samples a frame, mel hops 320"):
        preset("tiny", mel=MelConfig(hop_length=320))
    with pytest.raises(ValueError, match="vae has 4 latent channels, unet 8"):
        preset("tiny", vae=VAEConfig(latent_channels=4))


@pytest.mark.parametrize("changes, message", [
    ({"parameterization": "epsilon"}, "must be eps, v, x0, gaussian or caption-gaussian, got 'epsilon'"),
    ({"vocoder": "hifi-gan"}, "vocoder must be hifigan or griffin_lim, got 'hifi-gan'"),
])  # fmt: skip
def test_a_choice_that_there_is_not_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny", **changes)


@pytest.mark.parametrize("changes, message", [
    ({"optimizer": "sgd"}, "optimizer must be adamw or muon, got 'sgd'"),
    ({"lr_schedule": "linear"}, "lr_schedule must be cosine, wsd or constant, got 'linear'"),
    ({"max_steps": 0}, "max_steps and lr must be positive, got 0 and 0.001"),
    ({"lr": 0.0}, "max_steps and lr must be positive, got 1000 and 0.0"),
    ({"lr": float("nan")}, "lr must be a finite number, got nan"),
    ({"batch_size": 0}, "batch_size and save_every must be positive, got 0 and 500"),
    ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
    ({"max_steps": True}, "max_steps must be a whole number, got True"),
    ({"lr": float("inf")}, "lr must be a finite number, got inf"),
    ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
    ({"crop_frames": -1}, "crop_frames must be 0 or more, got -1"),
    ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
    ({"ema_decay": 1.0}, "ema_decay and betas must be from 0 to below 1, got 1.0"),
    ({"betas": (0.9, -0.1)}, "ema_decay and betas must be from 0 to below 1"),
    ({"save_every": -1}, "batch_size and save_every must be positive, got 16 and -1"),
])  # fmt: skip
def test_training_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StageConfig(**changes)


@pytest.mark.parametrize("of", [float, np.int64, np.float64])
def test_whole_floats_in_settings_are_integers(of):
    changed = preset("tiny", steps=of(50), guidance_interval=[of(0), of(500)])
    assert changed == preset("tiny", steps=50, guidance_interval=(0, 500)) and type(changed.steps) is int
    unet = replace(preset("tiny").unet, channel_mult=[of(1), of(2), of(2)])
    assert unet == preset("tiny").unet and {type(mult) for mult in unet.channel_mult} == {int}
    assert StageConfig(of(7)) == StageConfig(7) and MelConfig(n_mels=of(64)) == MelConfig()


@pytest.mark.parametrize("make, message", [
    (lambda: MelConfig(sample_rate=16), r"sample_rate \(Hz\) must be a whole number between 1000 and 1000000, got 16"),
    (lambda: MelConfig(n_mels=64.5), "n_mels must be a whole number, got 64.5"),
    (lambda: MelConfig(fmax=float("nan")), "fmax must be a finite number, got nan"),
    (lambda: StageConfig(betas=(0.9,)), r"betas must be a list of 2, got \(0.9,\)"),
    (lambda: StageConfig(betas=0.9), "betas must be a list of 2, got 0.9"),
    (lambda: VAEConfig(channel_mult=2), "channel_mult must be a list, got 2"),
    (lambda: MelConfig(fmax="8000"), "fmax must be a finite number, got '8000'"),
    (lambda: MelConfig(hop_length=0), "hop_length must be 1 or more, .* got 0 and 1024"),
    (lambda: VAEConfig(channel_mult=(1, 2.5)), "channel_mult must be a whole number, got 2.5"),
    (lambda: preset("tiny", steps=2.5), "steps must be a whole number, got 2.5"),
    (lambda: preset("tiny", candidates=-1), "candidates must be at least 1, got -1"),
    (lambda: preset("tiny", guidance_scale=float("inf")), "guidance_scale must be a finite number, got inf"),
    (lambda: preset("tiny", hifigan=replace(preset("tiny").hifigan, mel_corrections=-1)),
     "hifigan.mel_corrections must be at least 0, got -1"),
])  # fmt: skip
def test_numbers_that_no_setting_can_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_whole_floats_in_yaml_are_integers(tmp_path):
    text = "{preset: tiny, steps: 50.0, clips: 1e3, guidance_interval: [0.0, 5e2], training: {vae: {max_steps: 1e5}}}"
    config = load_config(written(tmp_path, text))
    assert (config.steps, config.clips, config.guidance_interval) == (50, 1000, (0, 500))
    assert config.training["vae"].max_steps == 100_000 and type(config.training["vae"].max_steps) is int


def written(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def test_yaml_changes_a_preset_at_any_depth(tmp_path):
    config = load_config(written(tmp_path, """
        preset: paper
        seconds: 5.12
        vae: {channels: 96}
        unet: {channel_mult: [1, 2, 3]}
        vocoder: {istft_n_fft: null, res_dilations: [[1, 3], [1, 3], [1, 3]]}
        training:
          ldm: {lr: 1e-4, max_steps: 7, betas: [0.5, 0.9]}
          vae: {weight_decay: 1}
    """))  # fmt: skip
    paper = preset("paper")
    assert config == preset(
        "paper", seconds=5.12, vae=replace(paper.vae, channels=96), unet=replace(paper.unet, channel_mult=(1, 2, 3)),
        hifigan=replace(paper.hifigan, res_dilations=((1, 3), (1, 3), (1, 3))),
        training=paper.training | {
            "ldm": replace(paper.training["ldm"], lr=1e-4, max_steps=7, betas=(0.5, 0.9)),
            "vae": replace(paper.training["vae"], weight_decay=1.0),
        },
    )  # fmt: skip
    assert type(config.training["vae"].weight_decay) is float


def test_yaml_anchors_work_and_no_preset_means_the_paper(tmp_path):
    config = load_config(written(tmp_path, "training: {vae: &s {lr: 0.5}, ldm: *s}"))
    assert config.training["vae"].lr == config.training["ldm"].lr == 0.5
    assert replace(config, training=Config().training) == Config()
    assert config.training["clap"] == StageConfig()


@pytest.mark.parametrize("text, message", [
    ("sekonds: 3", "unknown key 'sekonds'"),
    ("preset: huge", "no preset 'huge'"),
    ("vae: {chanels: 3}", "some.yaml: vae: unknown key 'chanels'"),
    ("vae: 3", "vae must hold settings by name, got 3"),
    ("training: {unet: {lr: 1}}", "unknown stage unet"),
    ("training: {vae: {lr: fast}}", r"training.vae: lr must be float, got 'fast'"),
    ("training: 5", "training must hold settings by name, got 5"),
    ("steps: 2.5", "steps must be int, got 2.5"),
    ("steps: yes", "steps must be int, got True"),
    ("seconds: null", "seconds must be float, got None"),
    ("data: 3", "data must be str, got 3"),
    ("unet: {film_scale: 1}", "film_scale must be bool, got 1"),
    ("unet: {channel_mult: 3}", "channel_mult must be tuple, got 3"),
    ("seconds: 0.333", "some.yaml: seconds=0.333 .* not a whole number"),
    ("vocoder: wavenet", "some.yaml: vocoder must be hifigan or griffin_lim, got 'wavenet'"),
    ("training: {ldm: {max_steps: 0}}", "training.ldm: max_steps and lr must be positive"),
    ("unet: {model_channels: 60}", "some.yaml: unet: level width 60"),
    ("data_sets: audiocaps", "data_sets must be tuple, got 'audiocaps'"),
    ("- a\n- b", "must hold settings by name, got list"),
    ("", "must hold settings by name, got NoneType"),
    ("a: [1", "is not plain YAML"),
    ("a: !!python/object/apply:os.getcwd []", "is not plain YAML"),
    ("a: !!timestamp x", "is not plain YAML"),
    ("a: " + "[" * 5000, "is not plain YAML"),
    ("a: &a {b: *a}", "is not plain YAML: it has more than 10000 values, or values more than 40 deep"),
    ("\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" if n else "a0: &a0 [1]" for n in range(30)),
     "is not plain YAML: it has more than 10000 values"),
    ("a: &a " + "x" * 60_000 + "\nb: [" + ", ".join(["*a"] * 20) + "]", "is not plain YAML: it has more than 10000"),
    ("# " + "x" * 2**20, "is no configuration: it has 1048578 bytes, 1048576 are the most"),
    ("unet: {channel_mult: [1, two]}", "unet: channel_mult must be int, got 'two'"),
    ("training: {vae: {betas: [0.9]}}", r"betas must have 2 values, got \[0.9\]"),
    ("vocoder: {res_dilations: [1]}", "res_dilations must be tuple, got 1"),
    ("seconds: .inf", "seconds must be a number below 1e.12, got inf"),
    ("training: {ldm: {lr: .nan}}", "lr must be a number below 1e.12, got nan"),
    ("guidance_scale: 1e999", "guidance_scale must be a number below 1e.12, got inf"),
    ("guidance_scale: 1" + "0" * 400, "guidance_scale must be a number below 1e.12, got 1000"),
    ("mel: {sample_rate: 1" + "0" * 400 + "}", "mel: sample_rate must be a number below"),
    ("name: ../../etc", "name must be a plain name, without folders, got '../../etc'"),
    ("name: ''", "name must be a plain name"),
    ("seconds: -2.56", "seconds must be between 0 and 3600, got -2.56"),
    ("beta_start: 0.5", "0 < beta_start < beta_end < 1, got 0.5 and 0.0195"),
    ("unconditional_probability: 2", "unconditional_probability must be between 0 and 1, got 2.0"),
    ("steps: 0", "steps must be at least 1, got 0"),
    ("vocoder: {rates: [5, 4, 2, 2, -2]}", "hifigan.rates must be at least 1"),
    ("vae: {channel_mult: []}", "vae.channel_mult is empty"),
    ("unet: {norm_groups: 0}", "must divide by norm_groups 0"),
    ("vae: {channels: 40}", "vae: level width 40 = 1 x channels 40 must divide by norm_groups 32"),
    ("vocoder: {channels: 72}", "hifigan.channels=72 must divide by 32: each of the 5 rates halves them"),
    ("mel: {n_mels: 48}", "mel.n_mels=48 is not a whole number of 32 = VAE 4 x U-Net 8"),
    ("mel: {n_mels: 96}", "vocoder reads 64 mel bands, mel has 96"),
])  # fmt: skip
def test_yaml_that_makes_no_sense_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_saved_yaml_shows_every_setting(tmp_path):
    preset("paper").save(tmp_path / "c.yaml")
    tree = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert tree["unet"]["channel_mult"] == [1, 2, 3, 5] and tree["training"]["ldm"]["optimizer"] == "adamw"
    assert tree["hifigan"]["res_dilations"] == [[1, 3, 5]] * 3 and tree["mel"]["fmax"] == 8000.0


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
KEYS = st.sampled_from(["preset", "model", *(f.name for c in (Config, StageConfig, *map(type, vars(Config()).values()))
                                             if is_dataclass(c) for f in fields(c))]) | PLAIN  # fmt: skip
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6))


@settings(deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.text("ab:{}[]&*!#-\n \"'|>%@0.e", max_size=60).map(str.encode)
       | TREES.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")))  # fmt: skip
def test_any_bytes_are_settings_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path)
    except ValueError as fault:
        assert "fuzzed.yaml" in str(fault)
    else:
        config.save(path)
        assert load_config(path) == config


@settings(deadline=2000)
@given(st.sampled_from([f.name for f in fields(Config)]), TREES)
def test_any_value_of_a_setting_is_taken_or_refused(tmp_path_factory, name, value):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump({"preset": "tiny", name: value}, allow_unicode=True), errors="surrogatepass")
    try:
        assert load_config(path).name
    except ValueError as fault:
        assert "fuzzed.yaml" in str(fault)


def test_a_configuration_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vae.safetensors").write_text("precious")
    with pytest.raises(IsADirectoryError, match="run is a folder, so it is not replaced"):
        preset("tiny").save(tmp_path / "run")
    assert (tmp_path / "run" / "vae.safetensors").read_text() == "precious"
