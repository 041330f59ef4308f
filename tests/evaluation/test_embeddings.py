"""Every embedding by its name, each from a file; those that are not part of this project in a small edition."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from refined_ldm.base.files import sha256
from refined_ldm.clap import Clap
from refined_ldm.evaluation.embeddings.aisfx import AISFX, AISFX_SHA256, Aisfx
from refined_ldm.evaluation.embeddings.panns import FFT, Cnn14
from refined_ldm.evaluation.embeddings.registry import EMBEDDINGS, open_embedding
from refined_ldm.evaluation.embeddings.vggish import VGGish
from tests.support import small
from tests.support.peers import noise, randomised


def test_aisfx_in_pieces_equals_aisfx_at_once(monkeypatch):
    if find_spec("aisfx") is None:
        pytest.skip(f"needs {AISFX}")
    embedding, waveform = open_embedding("aisfx"), 0.1 * noise(1, 3 * 44_100)
    assert (embedding.version, embedding.sha256, embedding.sample_rate) == ("aisfx 0.1.2", AISFX_SHA256, 44_100)
    rows, classes = embedding.embed_audio(waveform)
    assert rows.shape == (1, 512) and classes is None and embedding.embed_text is None
    torch.testing.assert_close(rows, Aisfx.load()(waveform, 44_100), rtol=1e-4, atol=1e-4)


def test_a_clap_embeds_sounds_and_captions(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "clap.safetensors"
    Clap(small.CLAP).eval().save(path)
    embedding = open_embedding("tiny-gpt2", path)
    assert (embedding.version, embedding.sha256) == ("tiny-gpt2, clap.safetensors", sha256(path))
    assert (embedding.sample_rate, embedding.seconds) == (16_000, 0.32)
    clap, waveform = Clap.load("tiny-gpt2", path), 0.1 * noise(1, 3000)
    with torch.no_grad():
        torch.testing.assert_close(embedding.embed_audio(waveform)[0], clap.embed_audio(waveform, 16_000))
        captions = [f"{i} dogs" for i in range(70)]  # more than are read at once
        np.testing.assert_allclose(embedding.embed_text(captions), clap.embed_text(captions), atol=1e-5)


def test_panns_gives_class_probabilities(tmp_path):
    torch.manual_seed(0)
    state = randomised(Cnn14(1024, width=2, classes=5)).state_dict()
    state |= {f"{FFT}.conv_{part}.weight": torch.zeros(513, 1, 1024) for part in ("real", "imag")}
    state["logmel_extractor.melW"] = state.pop("mel_bank") + 0.01
    torch.save({"model": state}, tmp_path / "Cnn14.pth")
    embedding, waveform = open_embedding("panns", tmp_path / "Cnn14.pth"), 0.1 * noise(1, 40_000)
    assert embedding.sample_rate == 32_000 and embedding.version == "Cnn14 of PANNs, Cnn14.pth"
    rows, classes = embedding.embed_audio(waveform)
    assert rows.shape == (1, 64) and classes.shape == (1, 5) and classes.sum().item() == pytest.approx(1)
    torch.testing.assert_close(classes.log().diff(), Cnn14.load(tmp_path / "Cnn14.pth")(waveform)[1].double().diff())


def test_vggish_gives_a_row_for_each_window(tmp_path):
    torch.manual_seed(0)
    torch.save(VGGish(width=2, hidden=8, embedding_dim=4).state_dict(), tmp_path / "vggish.pth")
    embedding = open_embedding("vggish", tmp_path / "vggish.pth")
    rows, classes = embedding.embed_audio(0.1 * noise(1, 40_000))
    assert rows.shape == (2, 4) and classes is None and (embedding.sample_rate, embedding.shortest) == (16_000, 15_600)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"panns needs .*Cnn14_16k_mAP=0\.438\.pth.*zenodo"):
        open_embedding("panns")
    with pytest.raises(FileNotFoundError, match=r"vggish needs .*vggish-10086976\.pth.*github"):
        open_embedding("vggish")
    with pytest.raises(ValueError, match=f"no embedding 'ear': choose one of {', '.join(EMBEDDINGS)}"):
        open_embedding("ear")
