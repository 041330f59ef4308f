import pytest
import torch
from torch.utils.data import Dataset

from refined_ldm.data import caches
from refined_ldm.data.caches import Cached, cache_clips, cache_latents, encoded_at_once
from tests.support import small


class Counted(Dataset):
    """Clips that count how often they are made, of which one may be bad."""

    def __init__(self, count, bad=None):
        self.clips, self.bad, self.made = small.clips(count), bad, 0

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        self.made += 1
        if index == self.bad:
            raise ValueError(f"clip-{index}.wav is empty")
        return self.clips[index]


def test_clips_are_made_once_and_read_back_within_16_bits(tmp_path):
    data, found = Counted(70), []
    kept = cache_clips(tmp_path / "clips", data, {"seed": 0}, lambda done, of: found.append((done, of)))
    assert data.made == 70 and found == [(64, 70), (70, 70)]
    for i in (0, 69):
        assert (kept[i]["waveform"] - data.clips[i]["waveform"]).abs().max() <= 0.5001 / 32767
        assert kept[i]["id"] == f"clip-{i}" and kept[i]["captions"] == list(data.clips[i]["captions"])
    cache_clips(tmp_path / "clips", data, {"seed": 0})
    assert data.made == 70  # taken as it is
    cache_clips(tmp_path / "clips", data, {"seed": 1})
    assert data.made == 140  # made of something else


def test_many_processes_make_what_one_makes(tmp_path, monkeypatch):
    one = cache_clips(tmp_path / "one", Counted(10), {})
    monkeypatch.setattr(caches, "render_workers", lambda count: 2)
    two = cache_clips(tmp_path / "two", Counted(10), {})
    assert one.rest == two.rest
    assert all(torch.equal(one[i]["waveform"], two[i]["waveform"]) for i in range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_is_named_in_the_error_and_no_cache_stays(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(caches, "render_workers", lambda count: workers)
    with pytest.raises(ValueError, match=r"^clip-7\.wav is empty$"):
        cache_clips(tmp_path / "clips", Counted(10, bad=7), {})
    assert not list(tmp_path.iterdir())


def test_processes_are_started_where_it_is_worth_it(monkeypatch):
    monkeypatch.setattr(caches.sys, "platform", "linux")
    monkeypatch.setattr(caches.os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert (caches.render_workers(255), caches.render_workers(256)) == (0, 3)
    monkeypatch.setattr(caches.sys, "platform", "darwin")  # which cannot fork safely
    assert caches.render_workers(10_000) == 0


def test_latents_repeat_captions_where_a_clip_has_fewer(tmp_path):
    clips = small.clips(3)
    clips[1] = clips[1] | {"captions": ("rain",)}
    kept = cache_latents(
        tmp_path / "latents", clips, lambda waveform: waveform[:, None, :4, None],
        lambda captions: torch.tensor([[len(caption)] for caption in captions]), {},
    )  # fmt: skip
    assert kept[0]["latent"].shape == (1, 4, 1) and kept[0]["latent"].dtype == torch.float32
    torch.testing.assert_close(kept[2]["latent"][0, :, 0], clips[2]["waveform"][:4], rtol=1e-3, atol=1e-4)
    assert kept[0]["embeddings"][:, 0].tolist() == [len(caption) for caption in clips[0]["captions"]]
    assert kept[1]["embeddings"][:, 0].tolist() == [4, 4]


def test_a_cut_array_is_no_cache(tmp_path):
    cache_clips(tmp_path / "clips", Counted(4), {})
    path = tmp_path / "clips" / "waveform.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError):
        Cached(tmp_path / "clips")
    with pytest.warns(UserWarning, match="is damaged .*: it is made again"):
        assert len(cache_clips(tmp_path / "clips", Counted(4), {})) == 4


@pytest.mark.parametrize(("seconds", "clips"), [(2.56, 32), (10.24, 8), (60 * 60, 1)])
def test_as_many_clips_go_through_a_vae_as_memory_allows(seconds, clips):
    assert encoded_at_once(round(16_000 * seconds)) == clips
