import math
from dataclasses import replace

import librosa
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refined_ldm.clap import CLAP_PRESETS, Clap, contrastive_loss

CAPTIONS = ["a dog barks", "rain falls on a tin roof while a bell rings", "!", ""]
TINY = ("tiny-gpt2", "tiny-roberta")


@pytest.fixture(scope="module", params=TINY)
def clap(request):
    torch.manual_seed(0)
    return Clap(CLAP_PRESETS[request.param]).eval()


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_shapes_and_unit_norm(clap):
    for waveform, rate, rows in ((noise(40_960), 16_000, 1), (noise(2, 777), 8000, 2), (noise(3, 200_001), 44_100, 3)):
        embedding = clap.embed_audio(waveform, rate)
        assert embedding.shape == (rows, clap.embedding_dim)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(rows))
    embedding = clap.embed_text(CAPTIONS)
    assert embedding.shape == (4, clap.embedding_dim)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    states, mask = clap.text_states(CAPTIONS)
    assert states.shape == (*mask.shape, 128) and mask.dtype == torch.bool and mask.all(1).sum() == 1


def test_towers_of_both_families_are_of_equal_size():
    sizes = []
    for name in TINY:
        clap = Clap(CLAP_PRESETS[name])
        table = clap.text.token_table.weight.numel()
        sizes.append(sum(p.numel() for p in clap.parameters()) - table)
    assert abs(sizes[0] / sizes[1] - 1) < 0.05


def test_decibels_equal_librosa(clap):
    waveform = noise(40_960)
    power = librosa.feature.melspectrogram(
        y=waveform.numpy(), sr=16_000, n_fft=1024, hop_length=160, n_mels=64, fmin=50, fmax=8000, pad_mode="reflect"
    )
    expected = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None)[:, :256].T
    np.testing.assert_allclose(clap.log_mel(waveform, 16_000)[0, 0].numpy(), expected, atol=1e-3)


@torch.no_grad()
def test_longer_clips_keep_their_start_and_shorter_ones_repeat(clap):
    waveform = noise(1, 60_000)
    torch.testing.assert_close(clap.embed_audio(waveform, 16_000), clap.embed_audio(waveform[:, :40_960], 16_000))
    short = waveform[:, :30_000]
    repeated = torch.cat([short, short[:, :10_960]], dim=1)
    torch.testing.assert_close(clap.embed_audio(short, 16_000), clap.embed_audio(repeated, 16_000))


@torch.no_grad()
def test_a_random_part_of_a_longer_clip_is_embedded_on_request(clap):
    waveform = noise(2, 60_000)
    first, again, other = (
        clap.embed_audio(waveform, 16_000, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and (first - other).abs().max() > 1e-3
    starts = torch.randint(60_000 - 40_960 + 1, (2,), generator=torch.Generator().manual_seed(1))
    parts = torch.stack([row[start : start + 40_960] for row, start in zip(waveform, starts, strict=True)])
    torch.testing.assert_close(first, clap.embed_audio(parts, 16_000), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_average_covers_all_of_a_longer_clip_and_leaves_a_shorter_one(clap):
    waveform = noise(2, 90_000)
    windows = clap._windows(clap.log_mel(waveform, 16_000, "average"))
    assert windows.shape == (2, 5, 1, 172, 64)  # 563 frames: windows start 86 frames after one another
    torch.testing.assert_close(windows[:, 2], clap.log_mel(waveform, 16_000, "average")[:, :, 172:344])
    pooled = torch.stack([clap.audio(window) for window in windows.unbind(1)]).mean(0)
    expected = torch.nn.functional.normalize(clap.audio_projection(pooled), dim=-1)
    torch.testing.assert_close(clap.embed_audio(waveform, 16_000, "average"), expected, atol=1e-5, rtol=0)
    for samples in (30_000, 40_960):
        embeddings = (clap.embed_audio(waveform[:, :samples], 16_000, crop) for crop in ("start", "random", "average"))
        start, *others = embeddings
        assert all(torch.equal(start, other) for other in others)
    with pytest.raises(ValueError, match='crop must be "start", "random" or "average", got .middle.'):
        clap.embed_audio(waveform, 16_000, "middle")


def test_laion_fills_with_whole_repeats_then_silence_in_16_bits():
    config = replace(CLAP_PRESETS["tiny-roberta"], fill="repeat-pad", int16=True)
    filled = Clap(config)._fit(torch.full((1, 15_000), 0.3))[0]
    assert torch.equal(filled[30_000:], torch.zeros(10_960))
    assert torch.equal(filled[:30_000], torch.full((30_000,), 9830 / 32767))  # 0.3 * 32767 = 9830.1


@torch.no_grad()
def test_other_rates_are_resampled(clap):
    t = torch.arange(0, 2.56, 1 / 44_100)
    high = torch.sin(2 * math.pi * 440 * t)
    low = torch.sin(2 * math.pi * 440 * torch.arange(0, 2.56, 1 / 16_000))
    assert (clap.embed_audio(high, 44_100) * clap.embed_audio(low, 16_000)).sum() > 0.99


@torch.no_grad()
def test_a_caption_means_the_same_alone_and_beside_a_longer_one(clap):
    together = clap.embed_text(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(together[i], clap.embed_text([caption])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_word_counts_even_behind_exclamation_marks_and_the_end_of_a_long_caption(clap):
    first, second = clap.embed_text(["stop!!!! a dog barks", "stop!!!! a dog barks twice"])
    assert (first - second).abs().max() > 1e-3


def test_contrastive_loss_is_log_batch_at_chance_and_zero_when_paired():
    same = torch.ones(8, 4) / 2
    assert contrastive_loss(same, same, torch.tensor(0.0)).item() == pytest.approx(math.log(8))
    assert contrastive_loss(torch.eye(8), torch.eye(8), torch.tensor(9.0)).item() < 1e-6
    assert contrastive_loss(torch.eye(8), torch.eye(8).roll(1, 0), torch.tensor(9.0)).item() == pytest.approx(100)


def test_contrastive_loss_equals_its_definition():
    audio = torch.nn.functional.normalize(noise(5, 7), dim=1)
    text = torch.nn.functional.normalize(noise(5, 7, seed=1), dim=1)
    logits = [[10 * float(a @ t) for t in text] for a in audio]
    loss = 0.0
    for i in range(5):
        loss -= logits[i][i] - math.log(sum(math.exp(logits[i][j]) for j in range(5)))
        loss -= logits[i][i] - math.log(sum(math.exp(logits[j][i]) for j in range(5)))
    assert contrastive_loss(audio, text, torch.tensor(math.log(10))).item() == pytest.approx(loss / 10, abs=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_one_batch_can_be_learned_and_every_weight_takes_part(name):
    torch.manual_seed(0)
    clap = Clap(replace(CLAP_PRESETS[name], audio_depths=(1, 1, 1), text_layers=1))
    t = torch.arange(40_960) / 16_000
    low, high = (0.4 * torch.sin(2 * math.pi * hz * t) for hz in (300, 3000))
    waveform = torch.stack([low, high, noise(40_960), 4 * noise(40_960) * (t % 0.5 < 0.01)])
    captions = ["a low tone", "a high tone", "steady noise", "two clicks a second"]
    optimizer = torch.optim.AdamW(clap.parameters(), lr=1e-3)
    for _ in range(40):
        loss = contrastive_loss(*clap(waveform, 16_000, captions), clap.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * math.log(4)
    assert not [name for name, p in clap.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_a_saved_conditioner_comes_back_small_and_equal(tmp_path):
    torch.manual_seed(1)
    for name in TINY:
        clap = Clap(CLAP_PRESETS[name]).eval()
        clap.share_unseen_tokens(CAPTIONS)
        clap.save(tmp_path / "exact.safetensors")
        clap.save(tmp_path / "half.safetensors", dtype=torch.float16)
        assert (tmp_path / "half.safetensors").stat().st_size < 5e6
        exact, half = (Clap.load(name, tmp_path / f"{kind}.safetensors") for kind in ("exact", "half"))
        assert not exact.training and exact.config == clap.config
        for key, tensor in clap.state_dict().items():
            assert torch.equal(tensor, exact.state_dict()[key]), key
        torch.testing.assert_close(half.embed_text(CAPTIONS), clap.embed_text(CAPTIONS), atol=2e-3, rtol=0)
        waveform = noise(2, 40_960)
        torch.testing.assert_close(
            half.embed_audio(waveform, 16_000), clap.embed_audio(waveform, 16_000), atol=2e-3, rtol=0
        )


@torch.no_grad()
def test_untrained_words_share_one_embedding():
    torch.manual_seed(0)
    clap = Clap(CLAP_PRESETS["tiny-gpt2"]).eval()
    clap.share_unseen_tokens(["a dog barks"])
    cat, cow, dog = clap.embed_text(["a cat", "a cow", "a dog"])
    assert torch.equal(cat, cow) and not torch.equal(cat, dog)


def test_missing_and_foreign_weights_are_refused_by_name(tmp_path):
    Clap(CLAP_PRESETS["tiny-gpt2"]).save(tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as file:
        header = file.metadata()
    tensors = load_file(tmp_path / "whole.safetensors")
    tensors["stranger"] = tensors.pop("text_projection.linear1.weight")
    save_file(tensors, tmp_path / "changed.safetensors", header)
    with pytest.raises(ValueError, match=r"missing: text_projection.linear1.weight.*unexpected: stranger"):
        Clap.load("tiny-gpt2", tmp_path / "changed.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", header)
    with pytest.raises(ValueError, match="not written by Clap.save"):
        Clap.load("tiny-gpt2", tmp_path / "other.safetensors")


def test_a_missing_tokenizer_blocks_captions_only(tmp_path):
    clap = Clap(CLAP_PRESETS["tiny-gpt2"], tokenizer=tmp_path).eval()
    assert clap.embed_audio(noise(40_960), 16_000).isfinite().all()
    with pytest.raises(FileNotFoundError, match="encoder.json"):
        clap.embed_text(["a dog barks"])


@pytest.mark.parametrize(
    "waveform, reason",
    [(torch.zeros(2, 1, 100), "must be"), (torch.zeros(0), "N > 0"), (torch.full((100,), math.nan), "NaN")],
)
def test_bad_waveforms_are_refused(clap, waveform, reason):
    with pytest.raises(ValueError, match=reason):
        clap.embed_audio(waveform, 16_000)


@torch.no_grad()
def test_silence_has_an_embedding(clap):
    assert clap.embed_audio(torch.zeros(40_960), 16_000).isfinite().all()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="choose one of ms-clap-2023, laion-clap, tiny-gpt2, tiny-roberta"):
        Clap.load("clap")
    with pytest.raises(FileNotFoundError, match=r"CLAP_weights_2023.pth .* MS-PL.*checkpoint="):
        Clap.load("ms-clap-2023")
    with pytest.raises(FileNotFoundError, match=r"630k-audioset-best.pt"):
        Clap.load("laion-clap", tmp_path / "nowhere.pt")
