"""What docs/scale.md states is what the code makes: caches and checkpoints on disk, operations and bytes."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from refined_ldm.data.batches import loader
from refined_ldm.data.caches import cache_clips, cache_latents
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.stages import train_ldm
from tests.benchmark import training_costs as scale
from tests.benchmark.training_costs import Gpu, checkpoint_bytes, clip_bytes, count, latent_bytes
from tests.support import small

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "figures" / "data"
TORCH = f"torch=={torch.__version__.split('+')[0]}"
TESTED = (ROOT / "constraints.txt").read_text().splitlines()


def test_what_a_linear_layer_takes_is_what_can_be_counted_by_hand():
    counted = count(lambda: nn.Linear(1000, 300, bias=False), lambda layer, batch: layer(torch.randn(batch, 1000)))
    assert counted.parameters == 300_000
    assert counted.activations == 4 * 1000 and counted.half_activations == 2 * 1000  # its input
    assert counted.forward == 2 * 300_000 and counted.both == 2 * counted.forward  # the input needs no gradient
    gpu = Gpu(flops=1e12, used=0.5, launch=1e-3)
    assert gpu.hours(3600, 1e12, 1) == pytest.approx(2) and gpu.hours(3600, 1.0, 7000) == pytest.approx(7)


def test_in_half_precision_tensors_are_cast_by_the_lists_of_cuda():
    def network():
        return nn.Sequential(nn.Linear(1000, 1000), nn.LayerNorm(1000))

    counted = count(network, lambda layers, batch: layers(torch.randn(batch, 1000)))
    norm = 4 * (1000 + 2)  # in float32, with its mean and deviation; the CPU's own lists leave it in bfloat16
    assert counted.half_activations == pytest.approx(2 * 1000 + norm, rel=0.01)


def test_caches_on_disk_have_the_bytes_of_the_page(tmp_path, monkeypatch):
    small.use_small_clap(monkeypatch)
    model = RefinedAudioLDM(small.config()).eval()
    clips = small.clips(50)
    cache_clips(tmp_path / "clips", clips, {})
    cache_latents(tmp_path / "latents", clips, model.encode, model.clap.embed_text, {})
    header = 128  # bytes of an .npy file
    sizes = {path.stem: path.stat().st_size - header for path in tmp_path.glob("*/*.npy")}
    assert sizes["waveform"] == 50 * clip_bytes(model.config)
    assert sizes["latent"] + sizes["embeddings"] == 50 * latent_bytes(model.config, captions=2)


def test_checkpoints_on_disk_have_the_bytes_of_the_page(tmp_path, monkeypatch):
    small.use_small_clap(monkeypatch)
    stage = replace(small.STAGE, max_steps=4, save_every=1, ema_decay=0.9)
    model = RefinedAudioLDM(small.config(training=small.config().training | {"ldm": stage}))
    list(train_ldm(model, loader(small.latents(8), 2), run_dir=tmp_path))
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    expected = checkpoint_bytes(sum(parameter.numel() for parameter in model.unet.parameters()))
    assert expected < kept < expected * 1.3  # headers and steps count where a network is this small
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in tmp_path.rglob("*.safetensors"))
    assert kept - headers == pytest.approx(expected, rel=0.01)


def test_the_page_states_the_sizes_of_its_preset():
    text, config = (ROOT / "docs" / "scale.md").read_text(), scale.preset("paper")
    assert f"A clip takes {clip_bytes(config):,} bytes in `clips-train` and {latent_bytes(config):,} in" in text
    assert f"{latent_bytes(config, 0):,} bytes for the latent" in text
    assert f"has {scale.conditioner_parameters(config):,} parameters" in text
    for data in scale.DATA_SETS:
        assert f"| {data.clips:,} | {data.hours:,.0f} |" in text
        assert scale._size(data.clips * latent_bytes(config)) in text
    assert [scale._three(x) for x in (0.01234, 1.234, 12.34, 999.7, 1234.0, 0)] == [
        "0.0123", "1.23", "12.3", "1,000", "1,230", "0"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(TORCH not in TESTED, reason="another torch launches otherwise")
def test_the_stored_tables_are_what_the_networks_take():
    for name, rows in scale.tables().items():
        with open(STORED / f"{name}.csv", newline="", encoding="utf-8") as file:
            assert list(csv.DictReader(file)) == rows, "python -m tests.benchmark.training_costs; make tables"
