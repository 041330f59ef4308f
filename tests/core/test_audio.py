"""Files of every kind come in as mono 16 kHz, faulty ones are named, and what is written reads back."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

from refined_ldm.audio import audio_seconds, load_audio, normalize, pad_or_trim, save_audio
from refined_ldm.base.lengths import parse_frame


def tone(rate: int, hertz: float = 440.0, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_any_format_and_rate_becomes_mono_16_khz(tmp_path, suffix, rate):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([tone(rate), 0 * tone(rate)], axis=1), rate)
    waveform = load_audio(path)
    assert waveform.shape == (8_000,) and waveform.dtype == torch.float32
    middle = slice(1_000, 7_000)
    assert np.abs(waveform[middle] - tone(16_000)[middle] / 2).max() < 0.03  # half: the other channel is silent


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (100, channels))
    soundfile.write(tmp_path / "noise.wav", samples, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "noise.wav"), samples.mean(axis=1), atol=1e-6)


def test_what_lies_above_the_new_nyquist_does_not_fold_down(tmp_path):
    soundfile.write(tmp_path / "high.wav", tone(48_000, hertz=15_000), 48_000)
    assert load_audio(tmp_path / "high.wav")[500:-500].abs().max() < 1e-3


def test_a_peak_above_one_is_scaled_to_one(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 6 * tone(16_000), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "loud.wav"), 2 * tone(16_000), atol=1e-3)


def test_silence_is_allowed(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(100), 16_000)
    assert torch.equal(load_audio(tmp_path / "silence.wav"), torch.zeros(100))


def write_fault(path, fault: str) -> None:
    whole = path.with_name("whole.wav")
    soundfile.write(whole, tone(16_000), 16_000)
    if fault == "empty":
        path.touch()
    elif fault == "not sound":
        path.write_text("file,caption\n")
    elif fault == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif fault == "truncated":
        path.write_bytes(whole.read_bytes()[:5_000])
    elif fault == "damaged":
        flac = path.with_name("whole.flac")
        soundfile.write(flac, tone(16_000), 16_000)
        path.write_bytes(flac.read_bytes()[:3_000])
    elif fault == "NaN":
        soundfile.write(path, np.array([0.0, np.nan, np.inf]), 16_000, subtype="FLOAT")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("empty", "0 bytes"),
        ("not sound", "libsndfile cannot read it"),
        ("no samples", "no samples"),
        ("truncated", "truncated, it announces 16000 bytes of sound and has 4956"),
        ("damaged", "damaged or truncated"),
        ("NaN", "2 samples are NaN or infinite"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, fault, message):
    write_fault(tmp_path / "fault.wav", fault)
    with pytest.raises(ValueError, match=f"fault.wav: .*({message})"):
        load_audio(tmp_path / "fault.wav")


@pytest.mark.parametrize("suffix, subtype, within", [
    ("wav", "PCM_U8", 1e-2), ("aiff", "PCM_S8", 1e-2), ("wav", "PCM_16", 1e-4), ("wav", "PCM_24", 1e-4),
    ("wav", "PCM_32", 1e-4), ("wav", "FLOAT", 1e-4), ("wav", "DOUBLE", 1e-4), ("wav", "ULAW", 3e-2),
])  # fmt: skip
def test_any_number_of_bits_is_read(tmp_path, suffix, subtype, within):
    soundfile.write(tmp_path / f"tone.{suffix}", tone(96_000), 96_000, subtype=subtype)
    waveform = load_audio(tmp_path / f"tone.{suffix}")
    assert len(waveform) == 8_000
    np.testing.assert_allclose(waveform[500:-500], tone(16_000)[500:-500], atol=within)


def test_one_sample_is_a_sound_unless_resampling_leaves_none(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.array([0.25]), 16_000)
    assert load_audio(tmp_path / "one.wav").tolist() == [0.25]
    soundfile.write(tmp_path / "fast.wav", np.array([0.25]), 48_000)
    with pytest.raises(ValueError, match="fast.wav: too short, its samples at 48000 Hz are less than one at 16000 Hz"):
        load_audio(tmp_path / "fast.wav")


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_a_part_is_what_the_whole_has_there(tmp_path, suffix, rate):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 2 * rate)
    path = tmp_path / f"noise.{suffix}"
    soundfile.write(path, noise, rate)
    whole = load_audio(path)
    assert audio_seconds(path) == pytest.approx(2, abs=0.1)
    torch.testing.assert_close(load_audio(path, seconds=0.5), whole[:8_000], atol=1e-4, rtol=0)
    if suffix != "mp3":  # whose frames lean on those before
        part = load_audio(path, seconds=0.5, start=1.0)
        torch.testing.assert_close(part[100:], whole[16_000:24_000][100:], atol=1e-4, rtol=0)
    assert len(load_audio(path, seconds=5)) == len(whole)
    with pytest.raises(ValueError, match=f"noise.{suffix}: the file holds no samples at 3 s"):
        load_audio(path, seconds=0.5, start=3.0)


def test_of_a_file_of_hours_no_more_is_read_than_is_wanted(tmp_path):
    path, size = tmp_path / "hours.wav", 4 * 3600 * 48_000 * 4
    form = struct.pack("<IHHIIHH", 16, 1, 2, 48_000, 192_000, 4, 16)
    path.write_bytes(b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size))
    os.truncate(path, size + 44)  # a hole: 2.8 GB of silence that take no place
    tracemalloc.start()
    try:
        assert len(load_audio(path, seconds=2.56)) == len(load_audio(path, seconds=2.56, start=10_000)) == 40_960
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_header_that_promises_more_than_memory_is_refused_first(tmp_path, suffix):
    path = tmp_path / f"lies.{suffix}"
    soundfile.write(path, tone(16_000), 16_000)
    data = bytearray(path.read_bytes())
    if suffix == "wav":
        data[40:44] = struct.pack("<I", 0x70000000)
    else:
        data[21] |= 0x0F
        data[22:26] = b"\xff" * 4  # 2^36 - 1 samples
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"lies.{suffix}: (damaged or )?truncated"):
            load_audio(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [1, 999, 2_000_000])
def test_a_rate_that_no_sound_has_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(16_000), rate)  # at 1 Hz it would become 128 million samples
    with pytest.raises(ValueError, match=f"a.wav: the sample rate must be 1000 to 1000000 Hz, got {rate} Hz"):
        load_audio(tmp_path / "a.wav")


def test_values_beyond_float32_are_no_sound(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full((100, 2), 3e38), 44_100, subtype="FLOAT")
    with pytest.raises(ValueError, match="a.wav: 100 samples are NaN or infinite"):
        load_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", np.full(100, 3e38), 44_100, subtype="FLOAT")
    assert load_audio(tmp_path / "a.wav").abs().max() == 1


@pytest.mark.parametrize("suffix, subtype", [
    ("mp3", None), ("flac", None), ("au", "PCM_16"), ("aiff", "PCM_16"), ("w64", "PCM_16"), ("caf", "PCM_16"),
    ("wav", "IMA_ADPCM"), ("wav", "GSM610"),
])  # fmt: skip
def test_half_a_file_of_any_format_is_refused(tmp_path, suffix, subtype):
    path = tmp_path / f"half.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.3, 0.3, 64_000), 16_000, subtype=subtype)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half\.{suffix}: .*(truncated|malformed)"):
        load_audio(path)


def test_a_recorder_that_did_not_know_the_length_is_no_fault(tmp_path):
    soundfile.write(tmp_path / "known.wav", tone(16_000), 16_000)
    data = bytearray((tmp_path / "known.wav").read_bytes())
    size = data.index(b"data") + 4
    data[size : size + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "streamed.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "streamed.wav")) == 8_000


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        load_audio(tmp_path / "missing.wav")
    with pytest.raises(FileNotFoundError, match="this is a folder"):
        load_audio(tmp_path)


def test_what_is_saved_reads_back(tmp_path):
    waveform = torch.linspace(-1, 1, 101)
    path = save_audio(tmp_path / "new" / "ramp.wav", waveform)
    assert soundfile.info(path).subtype == "PCM_16" and soundfile.info(path).samplerate == 16_000
    torch.testing.assert_close(load_audio(path), waveform, atol=1e-4, rtol=0)
    assert [file.name for file in path.parent.iterdir()] == ["ramp.wav"]


@pytest.mark.parametrize(
    "waveform, message",
    [
        (torch.tensor([0.0, torch.nan]), "NaN or infinity"),
        (torch.tensor([0.0, 1.5]), "its peak is 1.5"),
        (torch.zeros(2, 10), r"\(2, 10\)"),
        (torch.zeros(0), r"\(0,\)"),
    ],
)
def test_what_is_no_waveform_is_not_saved(tmp_path, waveform, message):
    with pytest.raises(ValueError, match=message):
        save_audio(tmp_path / "bad.wav", waveform)
    assert not list(tmp_path.iterdir())


def test_only_wav_is_saved(tmp_path):
    with pytest.raises(ValueError, match="must end in .wav"):
        save_audio(tmp_path / "sound.mp3", torch.zeros(10))


@pytest.mark.parametrize("samples", [1, 5, 9])
def test_pad_or_trim_keeps_the_start_and_adds_zeros(samples):
    waveform = torch.arange(1.0, 11.0).reshape(2, 5)
    out = pad_or_trim(waveform, samples)
    kept = min(samples, 5)
    assert out.shape == (2, samples)
    assert torch.equal(out[:, :kept], waveform[:, :kept]) and not out[:, kept:].any()


def test_normalize_is_audioldms_level():
    waveform = torch.rand(3, 1_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-2], [0.0]])
    out = normalize(waveform + 0.1)
    torch.testing.assert_close(out.abs().amax(dim=1), torch.tensor([0.5, 0.5, 0.0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(3), atol=1e-3, rtol=0)


def mp3(path, seconds=3.0, rate=44_100, channels=1, kind="", **how):
    """Noise behind silence as an MP3; "headless": without the frame that tells its length, "joined": twice."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate / 2), channels))
    soundfile.write(path, np.concatenate([0 * noise, noise]), rate, **how)
    raw = path.read_bytes()
    header = parse_frame(raw[:48])
    assert header.is_header
    path.write_bytes({"": raw, "headless": raw[header.size :], "joined": raw + raw}[kind])
    return path


VARIABLE = {"bitrate_mode": "VARIABLE", "compression_level": 0.0}


@pytest.mark.parametrize("how", [{}, VARIABLE], ids=["constant", "variable"])
@pytest.mark.parametrize("rate, channels", [(44_100, 1), (16_000, 2), (11_025, 1)])
def test_an_mp3_is_as_long_as_its_frames_despite_its_header(tmp_path, rate, channels, how):
    assert audio_seconds(mp3(tmp_path / "a.mp3", 3, rate, channels, **how)) == pytest.approx(3, abs=0.001)
    headless, joined = (mp3(tmp_path / f"{k}.mp3", 3, rate, channels, k, **how) for k in ("headless", "joined"))
    for path, seconds in ((headless, 3), (joined, 6)):
        assert audio_seconds(path) == pytest.approx(seconds, abs=0.4)
        whole = load_audio(path)
        assert len(whole) / 16_000 == pytest.approx(audio_seconds(path), abs=0.001)
        assert len(load_audio(path, seconds=0.5, start=seconds - 1)) == 8_000
    noise = load_audio(joined)[5 * 16_000 - 4_000 : 5 * 16_000]
    assert noise.square().mean() > 0.01  # the second file's


def test_tags_around_and_between_the_frames_of_an_mp3_are_no_sound(tmp_path):
    plain = mp3(tmp_path / "a.mp3", kind="headless", bitrate_mode="VARIABLE", compression_level=0.0)
    raw, picture = plain.read_bytes(), b"ID3\x04\x00\x00\x00\x00\x02\x01" + b"\xff\xfb\x90\x00" * 64 + b"x"
    (tmp_path / "tagged.mp3").write_bytes(picture + raw + b"TAG" + bytes(125) + picture + raw)
    assert audio_seconds(tmp_path / "tagged.mp3") == pytest.approx(2 * audio_seconds(plain), abs=0.1)


@pytest.mark.parametrize("kind", ["headless", "joined"])
def test_bytes_before_the_first_frame_of_an_mp3_are_no_sound(tmp_path, kind):
    plain = mp3(tmp_path / "a.mp3", kind=kind)
    (tmp_path / "padded.mp3").write_bytes(bytes(5_000) + plain.read_bytes())
    assert audio_seconds(tmp_path / "padded.mp3") == pytest.approx(audio_seconds(plain), abs=0.1)
    assert len(load_audio(tmp_path / "padded.mp3")) == pytest.approx(len(load_audio(plain)), abs=1_600)


def test_an_mp3_of_unknown_length_is_refused(tmp_path):
    other = mp3(tmp_path / "other.mp3", rate=48_000, kind="headless").read_bytes()
    mixed = mp3(tmp_path / "mixed.mp3", kind="headless")
    mixed.write_bytes(mixed.read_bytes() + other)
    for read in (load_audio, audio_seconds):
        with pytest.raises(ValueError, match="mixed.mp3: its length is unknown .*its frames differ.*; convert it"):
            read(mixed)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_is_cut_or_two_in_one_is_refused(tmp_path, subtype):
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(48_000, seconds=8), 48_000, subtype=subtype, format="OGG")
    raw = path.read_bytes()
    assert audio_seconds(path) == pytest.approx(8)
    last = raw.rindex(b"OggS")
    for part, message in ((raw[: len(raw) // 2], "truncated, it ends within a page"),
                       (raw[:last], "truncated, its last page"),
                       (raw + raw, "several sounds one behind the other")):  # fmt: skip
        path.write_bytes(part)
        for read in (load_audio, audio_seconds):
            with pytest.raises(ValueError, match=f"a.ogg: {message}"):
                read(path)


def test_a_streamed_flac_without_a_length_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(16_000), 16_000)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21:26] = bytes((raw[21] & 0xF0, 0, 0, 0, 0))
    (tmp_path / "a.flac").write_bytes(raw)
    for read in (load_audio, audio_seconds):
        with pytest.raises(ValueError, match="a.flac: its length is unknown, its header does not have it"):
            read(tmp_path / "a.flac")


@pytest.mark.parametrize("rate", [16, 0, -16_000, 2_000_000, 16_000.5, "16000", True, float("nan")])
def test_a_sample_rate_that_no_sound_has_is_refused_and_a_whole_float_is_an_integer(tmp_path, rate):
    save_audio(tmp_path / "a.wav", torch.zeros(16_000), 16_000.0)
    for whole in (8_000.0, np.int64(8_000), torch.tensor(8_000)):
        assert len(load_audio(tmp_path / "a.wav", whole)) == 8_000
    message = r"sample_rate \(Hz\) must be a whole number between 1000 and 1000000, got"
    with pytest.raises(ValueError, match=message):
        load_audio(tmp_path / "a.wav", rate)
    with pytest.raises(ValueError, match=message):
        save_audio(tmp_path / "b.wav", torch.zeros(9), rate)
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize("part", [{"seconds": 0}, {"seconds": -1}, {"seconds": float("nan")}, {"start": -1.0}])
def test_a_part_that_there_is_not_is_refused(tmp_path, part):
    save_audio(tmp_path / "a.wav", torch.zeros(16_000))
    with pytest.raises(ValueError, match="seconds must be positive and start 0 or more"):
        load_audio(tmp_path / "a.wav", **part)


def test_a_part_of_a_file_that_cannot_be_searched_is_read(tmp_path):
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(24_000) / 8000)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="GSM610")
    whole = load_audio(tmp_path / "a.wav", 8000)
    part = load_audio(tmp_path / "a.wav", 8000, seconds=1, start=1)
    torch.testing.assert_close(part, whole[8000:16_000])


@pytest.mark.parametrize("samples", [16_000, 16_001])
@pytest.mark.parametrize("ending, subtype", [("wav", "PCM_16"), ("wav", "PCM_U8"), ("flac", "PCM_16")])
def test_joined_files_are_refused_instead_of_read_in_part(tmp_path, ending, subtype, samples):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, samples)
    one, two = tmp_path / f"one.{ending}", tmp_path / f"two.{ending}"
    soundfile.write(one, noise, 16_000, subtype=subtype)
    two.write_bytes(2 * one.read_bytes())
    assert len(load_audio(one)) == samples
    with pytest.raises(ValueError, match=f"two.{ending}: several sounds one behind the other"):
        load_audio(two)
