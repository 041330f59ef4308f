"""AudioLDM's commands: a published YAML trains, goes on and infers; a list becomes one WAV file a line."""

import json
import re
from dataclasses import replace

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.config import load_config
from refined_ldm.published.caption_list import SOUNDS_AT_ONCE, open_model, read_list, sounds
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import published_yaml, small
from tests.support.published_yaml import FIRST, SMALL
from tests.support.recordings import audioldm_tree, record
from tests.support.shell import run

INFER = ("infer", "--config_yaml", "c.yaml", "--list_inference", "list.lst", "--reload_from_ckpt")
TRAIN = ("train", "-c", "shrunken.yaml", "--device", "cpu")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small model, its settings in c.yaml, its weights in run/ and, as AudioLDM writes them, in audioldm.ckpt."""
    monkeypatch.chdir(tmp_path)
    small.use_small_clap(monkeypatch)
    made = small.awake(RefinedAudioLDM(small.config(), seed=2)).eval()
    made.scale.fill_(0.7)
    made.clap.save("clap.safetensors")
    made.config.changed(clap_checkpoint="clap.safetensors").save("c.yaml")
    made.save("run")
    published_yaml.checkpoint("audioldm.ckpt", made)
    return made


def listed(tmp_path, text, encoding="utf-8"):
    (tmp_path / "list.lst").write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return tmp_path / "list.lst"


# --- lists ---


@pytest.mark.parametrize("text, files", [
    ("a dog barks\nRain, heavy.\n", ["a_dog_barks.wav", "Rain,_heavy.wav"]),
    ("\ufeffone|a dog\r\n\r\n  \ntwo.wav | rain \n3.WAV|wind", ["one.wav", "two.wav", "3.wav"]),
    ("rain\nrain\nRAIN\nx|rain\nX.wav|wind\n", ["rain.wav", "rain-2.wav", "RAIN-3.wav", "x.wav", "X-2.wav"]),
    ("the dog's bark: \"why?\"/\\..\n...\n?!", ["the_dog_s_bark_why.wav", "untitled.wav", "!.wav"]),
    ("झरना बहता है\n犬が吠える\nЛает собака", ["झरना_बहता_है.wav", "犬が吠える.wav", "Лает_собака.wav"]),
    ("x.mp3|a song|with a bar", ["x.mp3.wav"]),
])  # fmt: skip
def test_every_line_has_a_file_name_of_its_own(tmp_path, text, files):
    lines = read_list(listed(tmp_path, text))
    assert [line.file for line in lines] == files


def test_captions_are_kept_and_repeats_counted(tmp_path):
    lines = read_list(listed(tmp_path, "a|rain\nwind\nrain\nb| rain | hail\nrain"))
    assert [(line.caption, line.repeat) for line in lines] == [
        ("rain", 0), ("wind", 0), ("rain", 1), ("rain | hail", 0), ("rain", 2)]  # fmt: skip


def test_a_long_list_of_long_captions_is_read(tmp_path):
    lines = read_list(listed(tmp_path, "\n".join(f"{'𠀀犬' * 100} {'rain ' * 200} {n % 500}" for n in range(1000))))
    assert len({line.file for line in lines}) == 1000
    assert max(len(line.file.encode()) for line in lines) < 200


@pytest.mark.parametrize("text, message", [
    ("", "list.lst holds no caption"),
    (" \n\t\n", "list.lst holds no caption"),
    (b"\xff\xfe\x00", "list.lst is not a text in UTF-8"),
    ("rain\n../x|wind", "list.lst, line 2: expected `caption` or `filename|caption`, the name without folders"),
    ("/etc/x|wind", "line 1"), ("a\\b|wind", "line 1"), ("..|wind", "line 1"), ("|wind", "line 1"), ("x|", "line 1"),
    ("|", "line 1"), (f"{'x' * 201}|wind", "line 1"), ("a\x00b|wind", "line 1"),
])  # fmt: skip
def test_a_list_that_cannot_be_followed_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        read_list(listed(tmp_path, text))


BAD_LINES = b"rain\n../x|wind\n\xff\xfe\nsnow|\nb|hail\x00 falls\x07\n"


def test_bad_lines_are_all_named_or_left_out_and_listed(model, tmp_path, capsys):
    path = listed(tmp_path, BAD_LINES)
    with pytest.raises(ValueError) as caught:
        read_list(path)
    message = str(caught.value).splitlines()
    assert [line.split(": ")[0].split(", ")[-1] for line in message[:3]] == ["line 2", "line 3", "line 4"]
    assert "--skip-bad" in message[3]
    status, printed, errors = run(capsys, *INFER, "run", "--out", "o", "--device", "cpu", "--steps", 1)
    assert (status, printed) == (2, []) and not (tmp_path / "o").exists()  # nothing is made in vain
    status, printed, errors = run(capsys, *INFER, "run", "--out", "o", "--device", "cpu", "--steps", 1, "--skip-bad")
    assert (status, printed) == (0, ["o/rain.wav", "o/b.wav"])
    assert [error for error in errors if error.startswith("left out: list.lst, line ")] == errors[:3]
    assert [line.caption for line in read_list(path, [])] == ["rain", "hail  falls"]
    with pytest.raises(ValueError, match="holds no caption"):
        read_list(listed(tmp_path, b"\xff\n"), [])


def test_what_is_written_before_a_fault_stays_and_is_reported(model, tmp_path, monkeypatch, capsys):
    whole = RefinedAudioLDM.generate

    def fails_later(self, captions, **others):
        if "rain 8" in captions:
            raise FloatingPointError("the generated sound holds NaN")
        return whole(self, captions, **others)

    monkeypatch.setattr(RefinedAudioLDM, "generate", fails_later)
    listed(tmp_path, "\n".join(f"rain {n}" for n in range(SOUNDS_AT_ONCE + 1)))
    status, printed, errors = run(capsys, *INFER, "run", "--out", "o", "--device", "cpu", "--steps", 1)
    assert (status, errors[-1]) == (2, "refined-ldm infer: the generated sound holds NaN")
    assert printed == [f"o/rain_{n}.wav" for n in range(SOUNDS_AT_ONCE)]
    assert all(soundfile.info(path).frames == 5120 for path in printed)


def test_a_caption_that_comes_often_is_numbered_quickly(tmp_path):
    lines = read_list(listed(tmp_path, "rain-2\n" + "rain\n" * 20_000))  # took minutes when each was tried from 2 on
    assert len({line.file for line in lines}) == 20_001 and lines[-1].file == "rain-20001.wav"


ROWS = st.binary(max_size=40) | st.text("ab|./\\ \x00\n…", max_size=30).map(str.encode)


@settings(deadline=1000)
@given(st.lists(ROWS, max_size=6).map(b"\n".join), st.booleans())
def test_any_bytes_are_a_list_or_refused(tmp_path_factory, content, skip_bad):
    path, left_out = tmp_path_factory.getbasetemp() / "fuzzed.lst", [] if skip_bad else None
    path.write_bytes(content)
    try:
        lines = read_list(path, left_out)
    except ValueError as fault:
        assert "fuzzed.lst" in str(fault)
        return
    assert len({line.file.casefold() for line in lines}) == len(lines)
    for line in lines:
        assert line.caption == line.caption.strip() != "" and len(line.file.encode()) < 256
        assert not re.search(r"[/\\\x00-\x1f]", line.file) and line.file.endswith(".wav") and line.file != "..wav"
    assert not left_out or all("fuzzed.lst, line " in fault for fault in left_out)


def test_a_sound_depends_on_its_line_alone(model, tmp_path):
    captions = [f"bell {n}" for n in range(SOUNDS_AT_ONCE + 2)] + ["bell 0", "bell 1"]
    lines = read_list(listed(tmp_path, "\n".join(captions)))
    made = list(sounds(model, lines, steps=1))
    assert [line for line, _ in made] == lines
    waveforms = dict(zip((line.file for line in lines), (waveform for _, waveform in made), strict=True))
    assert not torch.equal(waveforms["bell_0.wav"], waveforms["bell_0-2.wav"])
    last = read_list(listed(tmp_path, "bell 9\nbell 1"))
    for line, waveform in sounds(model, last, steps=1):
        torch.testing.assert_close(waveform, waveforms[line.file], atol=1e-4, rtol=0)


# --- checkpoints ---


def test_infer_writes_a_wav_for_each_line(model, tmp_path, capsys):
    listed(tmp_path, "b|a dog barks\nrain\n\na|rain\n")
    status, printed, _ = run(capsys, *INFER, "run", "--out", "deep/out", "--device", "cpu", "--candidates", "2")
    assert (status, printed) == (0, ["deep/out/b.wav", "deep/out/rain.wav", "deep/out/a.wav"])
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == ["a.wav", "b.wav", "rain.wav"]
    for path in printed:
        info = soundfile.info(path)
        assert (info.frames, info.samplerate, info.subtype) == (5120, 16_000, "PCM_16")


def test_a_published_checkpoint_and_a_run_of_the_same_weights_sound_the_same(model, tmp_path, capsys):
    listed(tmp_path, "rain")
    for checkpoint, out in (("run", "a"), ("audioldm.ckpt", "b")):
        status, printed, _ = run(capsys, *INFER, checkpoint, "--out", out, "--seed", 3, "--steps", 2, "--guidance", 2,
                                 "--device", "cpu", "--json")  # fmt: skip
        (found,) = json.loads("".join(printed))["written"]
        assert status == 0 and found == {"file": f"{out}/rain.wav", "caption": "rain", "seed": 3, "seconds": 0.32}
    assert (tmp_path / "a/rain.wav").read_bytes() == (tmp_path / "b/rain.wav").read_bytes()


def test_without_a_vocoder_sounds_come_from_griffin_lim(model, tmp_path):
    state = torch.load("audioldm.ckpt")["state_dict"]
    torch.save({"state_dict": {k: v for k, v in state.items() if ".vocoder." not in k}}, "mute.ckpt")
    assert open_model(load_config("c.yaml"), "mute.ckpt").config.vocoder == "griffin_lim"


@pytest.mark.parametrize("changes, checkpoint, message", [
    ({}, "nowhere.ckpt", "no checkpoint at nowhere.ckpt"),
    ({}, "c.yaml", "c.yaml"),
    ({"parameterization": "eps", "beta_end": 0.02}, "run",
     "not those run was trained with: beta_end 0.02 (the run: 0.0195), parameterization eps (the run: v)"),
    ({"unet": replace(small.config().unet, head_channels=4)}, "run", "unet.head_channels 4 (the run: 8)"),
    ({"unet": replace(small.config().unet, model_channels=32)}, "audioldm.ckpt", "does not fit UNet"),
    ({"clap_checkpoint": ""}, "audioldm.ckpt", "no weights at clap-tiny-gpt2.safetensors"),
    ({"clap_checkpoint": "other.pth"}, "audioldm.ckpt", "clap_checkpoint"),
    ({}, "vae.ckpt", "vae.ckpt holds no unet, only vae"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_do_is_one_line(model, tmp_path, capsys, changes, checkpoint, message):
    listed(tmp_path, "rain")
    published_yaml.first_stage("vae.ckpt", model)
    load_config("c.yaml").changed(**changes).save("c.yaml")
    status, printed, errors = run(capsys, *INFER, checkpoint, "--device", "cpu")
    assert (status, printed, len(errors)) == (2, [], 1) and errors[0].startswith("refined-ldm infer: ")
    assert message in errors[0] and not (tmp_path / "runs").exists()


# --- the commands of the seed ---


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Where AudioLDM would run: shrunken.yaml, five recordings, the published conditioner's file, small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CLAP_PRESETS, "ms-clap-2023", replace(small.CLAP, embedding_dim=1024))
    Clap(CLAP_PRESETS["ms-clap-2023"]).save("clap.safetensors")
    published_yaml.write(tmp_path / "shrunken.yaml", SMALL)
    for n in range(5):
        record(tmp_path / "data/dataset/audio" / f"{n}.wav", seconds=0.5, seed=n)
    audioldm_tree(tmp_path, [{"wav": f"{n}.wav", "caption": f"noise {n}"} for n in range(5)], name="audiocaps")
    return tmp_path


def test_a_shrunken_copy_of_the_seeds_file_trains_goes_on_and_infers(workplace, capsys):
    status, printed, errors = run(capsys, *TRAIN)
    assert (status, printed) == (2, []) and "first_stage_config.params.reload_from_ckpt" in errors[-1]
    published_yaml.write(workplace / "shrunken.yaml", SMALL | published_yaml.NO_FILE)
    given = ("--clap-checkpoint", "clap.safetensors")
    status, printed, _ = run(capsys, *TRAIN, *given, "--max-steps", 3)
    assert (status, [line.split(",")[0] for line in printed]) == (0, ["vae: 3 steps", "ldm: 3 steps"])
    run_dir = workplace / "runs" / "shrunken"
    assert not (run_dir / "clap-ms-clap-2023.safetensors").exists()  # it stays where it is
    listed(workplace, "b|a dog barks\nrain\nतूफ़ान")
    infer = ("infer", "-c", "shrunken.yaml", "-l", "list.lst", "--device", "cpu", "--candidates", 1)

    (run_dir / "ldm.safetensors").unlink()  # as if it had been killed
    step = run_dir / "checkpoints" / "ldm" / "step-0000003"
    status, halfway, _ = run(capsys, *infer, *given, "--reload_from_ckpt", step, "--out", "halfway")
    assert (status, len(halfway)) == (0, 3)
    status, printed, _ = run(capsys, *TRAIN, *given, "--stage", "ldm", "--resume")
    assert (status, [line.split(",")[0] for line in printed]) == (0, ["ldm: 6 steps"])

    status, printed, _ = run(capsys, *infer, "--reload_from_ckpt", run_dir)  # it knows where its conditioner is
    assert (status, printed) == (0, [f"runs/infer/{name}.wav" for name in ("b", "rain", "तूफ़ान")])
    assert all(soundfile.info(path).frames == 10_240 for path in printed)
    status, printed, _ = run(capsys, "generate", "rain", "--checkpoint", run_dir, "--out", "o", "--device", "cpu")
    assert status == 0


def test_a_conditioner_that_is_nowhere_is_reported_before_clips_are_decoded(workplace, capsys):
    published_yaml.write(workplace / "shrunken.yaml", SMALL | {FIRST + "reload_from_ckpt": "vae.ckpt"})
    config = load_config("shrunken.yaml")
    published_yaml.first_stage("vae.ckpt", RefinedAudioLDM(config))
    status, _, errors = run(capsys, *TRAIN)
    assert status == 2 and "the U-Net needs a conditioner: name its file with --clap-checkpoint" in errors[-1]
    assert "CLAP_weights_2023.pth" in errors[-1] and not (workplace / "runs/shrunken/clips-train").exists()


# --- what is said of other folders and names ---


@pytest.mark.parametrize("row, message", [
    (".hidden|rain", "a name that begins with a dot is hidden"), ("con|rain", "keep this name for a device"),
    ("|rain", "there is no name"), ("x|", "there is no caption"), ("é" * 101 + "|rain", "the name has 202 bytes"),
])  # fmt: skip
def test_a_name_that_some_system_cannot_keep_is_reported(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"list.lst, line 2: expected `caption` or .*{message}"):
        read_list(listed(tmp_path, f"wind\n{row}\n"))


def test_a_list_that_is_no_file_is_reported(tmp_path):
    with pytest.raises(ValueError, match="/dev/null holds no caption"):
        read_list("/dev/null")
    with pytest.raises(IsADirectoryError, match="is a folder: give a list of captions"):
        read_list(tmp_path)
    with pytest.raises(FileNotFoundError, match="no list of captions at"):
        read_list(tmp_path / "nowhere")


def test_a_folder_that_is_no_run_is_reported_with_the_one_to_give(model, tmp_path):
    step = tmp_path / "r" / "checkpoints" / "ldm" / "step-0000003"
    step.parent.mkdir(parents=True)
    config = load_config("c.yaml")
    for place in (step.parent, tmp_path / "r"):
        with pytest.raises(ValueError, match="is no run's folder .* no U-Net was trained there yet"):
            open_model(config, place)
    step.mkdir()
    (step / "unet.safetensors").touch()
    for place in (step.parent, tmp_path / "r"):
        with pytest.raises(ValueError, match=f"no pipeline: give {step}"):
            open_model(config, place)
