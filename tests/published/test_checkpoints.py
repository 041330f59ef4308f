import argparse
import io
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from refined_ldm.clap import Clap, ClapConfig
from refined_ldm.cli import commands as cli
from refined_ldm.hifigan import HiFiGAN, HiFiGANConfig
from refined_ldm.published import unpickling
from refined_ldm.published.checkpoints import (
    convert_checkpoint,
    detect_checkpoint_type,
    inspect_checkpoint,
    read_audioldm,
    read_parts,
    read_tensors,
)
from refined_ldm.published.unpickling import forbidden, unpickle
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.vae import MelVAE, VAEConfig
from refined_ldm.weights import is_ours, read_weights, save_weights
from tests.support import small
from tests.support.peers import published_ms_clap
from tests.support.weight_norm import add_weight_norm


class Asks:
    """A pickle of this calls `function(*arguments)` when an unsafe reader loads it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, arguments, named", [
    (os.system, ("touch RAN",), "os.system"),
    (eval, ("open('RAN', 'w')",), "builtins.eval"),
    (subprocess.Popen, (["touch", "RAN"],), "subprocess.Popen"),
    (torch.hub.load, ("nobody/nothing", "x"), "torch.hub.load"),
])  # fmt: skip
def test_a_pickle_that_would_run_code_is_refused_by_name_and_nothing_runs(
    tmp_path, monkeypatch, capsys, function, arguments, named
):
    monkeypatch.chdir(tmp_path)
    harmful = {"state_dict": {"a": torch.ones(2), "b": Asks(function, *arguments)}}
    torch.save(harmful, "zip.ckpt")
    torch.save(harmful, "older.ckpt", _use_new_zipfile_serialization=False)
    for protocol in (2, 4):
        Path(f"plain{protocol}.pth").write_bytes(pickle.dumps({"model": Asks(function, *arguments)}, protocol))
    torch.save(harmful, "zip4.ckpt", pickle_protocol=4)
    torch.save(harmful, "older5.ckpt", pickle_protocol=5, _use_new_zipfile_serialization=False)
    for path in ("zip.ckpt", "older.ckpt", "plain2.pth", "plain4.pth", "zip4.ckpt", "older5.ckpt"):
        for read in (unpickle, read_tensors, read_parts, read_audioldm):
            with pytest.raises(ValueError, match=rf"^{path} was refused: it asks to run .*{named}"):
                read(path)
        if named != "torch.hub.load":  # which only torch knows for forbidden, and says so when it reads
            found = inspect_checkpoint(path)
            assert found.kind == "refused" and named in found.forbidden and found.groups == ()
        assert cli.main(["inspect", path]) == 2
        assert f"{path} was refused: it asks to run" in capsys.readouterr().err
        assert cli.main(["convert", path, "out.safetensors"]) == 2
        with pytest.raises(ValueError, match="asks to run"):
            Clap.load("ms-clap-2023", path)
    assert not Path("RAN").exists() and not Path("out.safetensors").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_lightning_puts_around_a_state_dict_is_read(tmp_path, protocol, zipped):
    contents = {
        "state_dict": OrderedDict(w=nn.Parameter(torch.ones(2, 3))), "epoch": 3, "pytorch-lightning_version": "1.9.5",
        "best": np.float64(0.25), "step": np.int64(7), "rates": np.float32(1.5), "hparams": argparse.Namespace(lr=1e-4),
        "optimizer_states": [{"state": defaultdict(dict, {0: {"exp_avg": torch.zeros(2)}}), "param_groups": []}],
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best_k_models": {"/a": torch.tensor(1.0)}, "dirpath": None}},
        "random": np.random.get_state(), "losses": np.ones(3), "there": pathlib.PureWindowsPath("C:/a"),
        "root": tmp_path, "size": torch.Size([2]), "kinds": {1, 2}, "type": dict,
    }  # fmt: skip
    torch.save(contents, tmp_path / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = unpickle(tmp_path / "a.ckpt")
    assert (found["best"], found["step"], found["rates"], found["hparams"].lr) == (0.25, 7, 1.5, 1e-4)
    assert found["optimizer_states"][0]["state"][0]["exp_avg"].shape == (2,) and str(found["root"]) == str(tmp_path)
    assert np.array_equal(found["random"][1], contents["random"][1]) and found["losses"].tolist() == [1, 1, 1]
    assert forbidden(tmp_path / "a.ckpt") == [] and found["there"] == contents["there"]
    tensors = read_tensors(tmp_path / "a.ckpt")
    assert list(tensors) == ["w"] and torch.equal(tensors["w"], torch.ones(2, 3))


@pytest.mark.parametrize("module, name", [
    ("torch", "load"), ("torch.serialization", "load"), ("torch.storage", "_load_from_bytes"), ("builtins", "getattr"),
    ("numpy", "load"), ("torch._utils", "os.system"), ("torch._utils", "_import_dotted_name"), ("os", "system"),
])  # fmt: skip
def test_a_pickle_of_protocol_4_finds_only_what_is_listed(module, name):
    with pytest.raises(pickle.UnpicklingError, match=rf"GLOBAL {module}.{name} "):
        unpickling._Restricted(io.BytesIO()).find_class(module, name)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the latter from Python 3.13 on
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_paths_are_read_whichever_system_wrote_them(module, name):
    with torch.serialization.safe_globals(unpickling.HARMLESS):
        found = unpickling._Restricted(io.BytesIO()).find_class(module, name)
    assert found is getattr(pathlib, f"Pure{name}") and f"{module}.{name}" in unpickling.ALLOWED


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the memory map of a process")
def test_tensors_stay_on_disk_until_they_are_used(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1_000_000)}}, tmp_path / "large.ckpt")
    tensors = read_tensors(tmp_path / "large.ckpt")
    assert "large.ckpt" in Path("/proc/self/maps").read_text() and tensors["w"].sum() == 1_000_000


PNG, WAV = b"\x89PNG\r\n\x1a\n" + bytes(60), b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(60)


@pytest.mark.parametrize("content, message", [
    (b"", r"empty \(0 bytes\)"), (PNG, "a PNG picture"), (WAV, "a WAV recording"), (b'{"model": 1}', "JSON"),
    (b"not a checkpoint at all", "text"), (b"<!DOCTYPE html><html>quota exceeded</html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer that git LFS left"),
    (bytes(100), "of no known format"),
    ("ZIP", "cut, damaged or no checkpoint"), ("PICKLE", "cut, damaged or no checkpoint"),
    ("SAFETENSORS", "cut or damaged safetensors"), ("LIST", "holds list where tensors by name were expected"),
    ("NUMBERS", "holds a dict of epoch, loss where tensors"), ("ARCHIVE", "cut, damaged or no checkpoint"),
    ("PACKED", "a compressed archive"), ("PROGRAM", "a program of torch.jit"), ("NOTHING", "holds a dict of nothing"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.ckpt", "a.pth", "a.safetensors"])
def test_what_is_no_checkpoint_gets_one_clear_line(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content == "LIST":
        torch.save([torch.ones(2)], path)
    elif content == "NUMBERS":
        torch.save({"epoch": 1, "loss": 0.5}, path)
    elif content == "NOTHING":
        torch.save({}, path)
    elif content in ("ARCHIVE", "PACKED", "PROGRAM"):
        kind = zipfile.ZIP_DEFLATED if content == "PACKED" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("linear/constants.pkl" if content == "PROGRAM" else "notes.txt", "hello")
    elif isinstance(content, str):
        whole = {"state_dict": {"w": torch.arange(5000.0)}}
        if content == "SAFETENSORS":
            save_file(whole["state_dict"], path)
        else:
            torch.save(whole, path, _use_new_zipfile_serialization=content == "ZIP")
        path.write_bytes(path.read_bytes()[:-9000])
    else:
        path.write_bytes(content)
    if name == "a.safetensors" and content in (
        "ZIP",
        "PICKLE",
        "LIST",
        "NUMBERS",
        "ARCHIVE",
        "PACKED",
        "PROGRAM",
        "NOTHING",
    ):
        message = "a pickle under the name of safetensors"
    for read in (read_tensors, read_parts, read_audioldm, inspect_checkpoint):
        with pytest.raises(ValueError, match=f"{name} was refused: it (is )?{message}") as error:
            read(path)
        assert "\n" not in str(error.value)
    for command in (["inspect", str(path)], ["convert", str(path), str(tmp_path / "out")]):
        assert cli.main(command) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_first_stage_of_other_sizes_is_refused_by_its_sizes(tmp_path):
    save_file(MelVAE(VAEConfig(channels=8, norm_groups=4)).state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="vae.safetensors: a VAE of 8 channels does not divide into 32 norm_groups"):
        convert_checkpoint(tmp_path / "vae.safetensors", tmp_path / "out.safetensors")


def test_no_file_and_a_directory_are_reported(tmp_path):
    for read in (read_tensors, read_parts, inspect_checkpoint):
        with pytest.raises(FileNotFoundError, match="no file .*nowhere.ckpt"):
            read(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="is a directory"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "generator", "model_state_dict", "ema", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_forward_module."])
def test_tensors_come_out_of_whichever_wrapper(tmp_path, wrapper, prefix):
    tensors = {f"{prefix}module_list.0.weight": torch.ones(3), f"{prefix}b": torch.zeros(1)}
    torch.save({wrapper: tensors, "epoch": 1} if wrapper else tensors, tmp_path / "a.pt")
    assert set(read_tensors(tmp_path / "a.pt")) == {"module_list.0.weight", "b"}
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert (found.wrapper, found.kind, found.python) == (wrapper, "unknown", "none")
    save_file(tensors, tmp_path / "renamed.ckpt")  # by what it holds, not by its name
    assert set(read_tensors(tmp_path / "renamed.ckpt")) == {"module_list.0.weight", "b"}


@pytest.mark.parametrize("names, kind", [
    (["model.diffusion_model.out.2.bias", "first_stage_model.encoder.conv_in.weight"], "audioldm"),
    (["film_emb.weight", "input_blocks.0.0.weight"], "unet"), (["class_embedding.weight"], "unet"),
    (["encoder.conv_in.weight", "loss.logvar"], "vae"), (["conv_pre.weight_g", "ups.0.bias"], "hifigan"),
    (["conv_pre.parametrizations.weight.original0"], "hifigan"), (["unet.film_embed.weight", "scale"], "ldm"),
    (["model_ema.diffusion_modelout2bias"], "audioldm"), (["film_emb.bias"], "unet"), (["conv_post.bias"], "hifigan"),
    (["decoder.conv_out.bias"], "vae"), (["caption_encoder.base.ln_f.bias"], "ms-clap-2023"),
    (["audio_encoder.base.htsat.bn0.bias", "caption_encoder.base.wte.weight"], "ms-clap-2023"),
    (["audio_branch.bn0.bias", "text_branch.embeddings.word_embeddings.weight"], "laion-clap"),
    (["audio_branch.patch_embed.mel_conv2d.weight", "text_branch.embeddings.LayerNorm.bias"], "laion-clap fusion"),
    (["audio_branch.patch_embed.fusion_model.local_att.0.bias"], "laion-clap fusion"), (["token_rows"], "clap"),
    (["weight"], "unknown"), ([], "unknown"),
    (["middle.0.qkv.lora_A.weight", "middle.0.qkv.lora_B.weight"], "lora"),
])  # fmt: skip
def test_a_file_is_recognised_by_the_names_of_its_tensors(names, kind):
    assert detect_checkpoint_type(dict.fromkeys(names)) == kind


def test_a_fusion_checkpoint_is_refused_with_what_to_take_instead(tmp_path):
    names = ("audio_branch.patch_embed.mel_conv2d.weight", "text_branch.embeddings.word_embeddings.weight")
    torch.save({"state_dict": {f"module.{name}": torch.ones(2, 2) for name in names}}, tmp_path / "fusion.pt")
    message = "fusion.pt is no laion-clap checkpoint: feature fusion is not supported; take 630k-audioset-best.pt"
    with pytest.raises(ValueError, match=message):
        Clap.load("laion-clap", tmp_path / "fusion.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "fusion.pt", tmp_path / "out.safetensors")
    found = inspect_checkpoint(tmp_path / "fusion.pt")
    assert found.kind == "laion-clap fusion" and "take 630k-audioset-best.pt" in found.python


def written_bytes(form):
    """A small checkpoint in one of four forms."""
    file, tensors = io.BytesIO(), {"conv_pre.weight": torch.ones(2), "b": torch.zeros(3, dtype=torch.int64)}
    if form == "safetensors":
        return save(tensors, {"config": "{}"})
    if form == "pickle":
        return pickle.dumps({"state_dict": {"a": np.float64(1)}, "b": [1, "x", None]}, 2)
    torch.save({"state_dict": tensors, "step": np.int64(1)}, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


WHOLE = {form: written_bytes(form) for form in ("zip", "older", "pickle", "safetensors")}
PLACES = st.integers(0, 700) | st.integers(0, 4000)


@settings(deadline=4000, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(form=st.sampled_from(sorted(WHOLE)), patches=st.lists(st.tuples(PLACES, st.binary(max_size=9)), max_size=3),
       cut=st.integers(0, 4000) | st.just(None))  # fmt: skip
@example("pickle", [(2, b"\x8e" + b"\xff" * 4 + b"\x00" * 4)], None)  # a string of 4 GB
@example("pickle", [(2, b"\x8e" + b"\xff" * 6 + b"\x00" * 2)], None)  # a string of 2^48 bytes
@example("pickle", [(2, b"\x8cx\x93.")], None)  # a global that is named by one string
@example("safetensors", [(0, b"\xff\xff\xff\x07\x00\x00\x00\x00")], None)
def test_any_bytes_are_a_checkpoint_or_refused(tmp_path_factory, form, patches, cut):
    raw = bytearray(WHOLE[form])
    for place, patch in patches:
        raw[place : place + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    path.write_bytes(raw[:cut])
    for read in (inspect_checkpoint, read_tensors, read_weights):
        try:
            read(path)
        except ValueError as fault:
            assert "fuzzed.ckpt" in str(fault)


@settings(deadline=4000)
@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda raw: b"\x80\x02" + raw))
def test_any_bytes_at_all_are_no_checkpoint(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    path.write_bytes(content)
    assert isinstance(forbidden(path), list)
    with pytest.raises(ValueError, match="fuzzed.ckpt"):
        read_tensors(path)


# --- inspection and conversion ---


@pytest.fixture
def ms_clap(tmp_path):
    """(a small MS-CLAP, the file its authors would have written)"""
    settings = small.CLAP.__dict__ | {"text_width": 64, "text_heads": 1, "embedding_dim": 1024, "text_positions": 90}
    clap = Clap(ClapConfig(**settings)).eval()
    torch.save({"model": published_ms_clap(clap), "epoch": 1}, tmp_path / "CLAP_weights_2023.pth")
    return clap, tmp_path / "CLAP_weights_2023.pth"


@torch.no_grad()
def test_a_conditioner_is_converted(ms_clap, tmp_path, capsys):
    clap, path = ms_clap
    found = inspect_checkpoint(path)
    assert (found.kind, found.wrapper) == ("ms-clap-2023", "model") and f'"ms-clap-2023", "{path}"' in found.python
    out = tmp_path / "deep" / "clap.safetensors"
    assert cli.main(["convert", str(path), str(out)]) == 0 and capsys.readouterr().out == f"{out}\n"
    expected, again = Clap.load("ms-clap-2023", path), Clap.load("ms-clap-2023", out)
    captions = ["rain", "a dog barks"]
    torch.testing.assert_close(clap.embed_text(captions), expected.embed_text(captions), atol=1e-6, rtol=0)
    assert torch.equal(expected.embed_text(captions), again.embed_text(captions))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert is_ours(out) and not is_ours(path) and inspect_checkpoint(out).kind == "clap"
    for tensor in read_tensors(out).values():
        assert tensor.dtype in (torch.float32, torch.int16, torch.int64)


def test_a_conditioner_of_another_name_is_refused(ms_clap, tmp_path):
    with pytest.raises(ValueError, match="CLAP_weights_2023.pth is no laion-clap checkpoint but ms-clap-2023"):
        Clap.load("laion-clap", ms_clap[1])
    with pytest.raises(FileNotFoundError, match=r"no file .*x.pth: download CLAP_weights_2023.pth .*MS-PL.* by hand"):
        Clap.load("ms-clap-2023", tmp_path / "x.pth")
    torch.save({"model": {"weights": torch.zeros(3)}}, tmp_path / "towerless.pth")
    with pytest.raises(ValueError, match="towerless.pth is no ms-clap-2023 checkpoint: no conditioner is among"):
        Clap.load("ms-clap-2023", tmp_path / "towerless.pth")
    towerless = {name: tensor for name, tensor in published_ms_clap(ms_clap[0]).items() if "htsat" not in name}
    torch.save({"model": towerless}, tmp_path / "no-htsat.pth")
    with pytest.raises(ValueError, match="no-htsat.pth is no ms-clap-2023 checkpoint: it holds no HTS-AT"):
        Clap.load("ms-clap-2023", tmp_path / "no-htsat.pth")


def test_what_is_there_is_replaced_only_when_asked(ms_clap, tmp_path):
    _, path = ms_clap
    out = tmp_path / "clap.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="clap.safetensors is there already: .*--force"):
        convert_checkpoint(path, out)
    assert out.read_bytes() == b"precious" and cli.main(["convert", str(path), str(out)]) == 2
    assert cli.main(["convert", str(path), str(out), "--force"]) == 0 and is_ours(out)
    with pytest.raises(ValueError, match="one file: give a name that ends in .safetensors, got .*folder"):
        convert_checkpoint(path, tmp_path / "folder")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.safetensors is a folder, so it is not replaced"):
        convert_checkpoint(path, tmp_path / "folder.safetensors", force=True)


def test_our_own_files_and_unknown_ones_are_distinguished(tmp_path, capsys):
    generator = HiFiGAN(HiFiGANConfig(n_mels=16, channels=32))
    save_weights(tmp_path / "hifigan.safetensors", generator, generator.config)
    save_file(generator.state_dict(), tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    ours, foreign = (inspect_checkpoint(tmp_path / f"{name}.safetensors") for name in ("hifigan", "foreign"))
    assert ours.kind == foreign.kind == "hifigan" and ours.groups == foreign.groups
    assert "RefinedAudioLDM.load" in ours.python and "convert" in foreign.command
    parameters = sum(p.numel() for p in generator.parameters())
    assert sum(group.parameters for group in foreign.groups) == parameters
    assert {group.prefix for group in foreign.groups} == {"conv_pre", "ups", "resblocks", "conv_post"}
    assert cli.main(["inspect", str(tmp_path / "foreign.safetensors")]) == 0
    table = capsys.readouterr().out
    assert "foreign.safetensors: hifigan, " in table and foreign.sha256 in table and "float32" in table
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is unknown: what is converted is"):
        convert_checkpoint(tmp_path / "other.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("part", ["vae", "hifigan"])
def test_a_missing_tensor_of_a_single_component_is_named(tmp_path, capsys, part):
    module = MelVAE(VAEConfig(2, 32, (1, 2), 1)) if part == "vae" else HiFiGAN(HiFiGANConfig(n_mels=16, channels=32))
    for normed in [False, True] if part == "hifigan" else [False]:
        whole = (add_weight_norm(module) if normed else module).state_dict()
        for missing in {name.split(".")[0] + name[-12:]: name for name in whole}.values():
            torch.save({"state_dict": {k: v for k, v in whole.items() if k != missing}}, tmp_path / "a.ckpt")
            assert cli.main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "out.safetensors")]) == 2
            fault = capsys.readouterr().err
            assert len(fault.splitlines()) == 1 and "a.ckpt" in fault and re.search("lacks|1 missing", fault)
            assert missing in fault


def test_a_run_that_lacks_a_tensor_or_has_a_scale_with_an_axis(tmp_path, monkeypatch):
    model = small.awake_model(monkeypatch)
    model.save(tmp_path)
    path = tmp_path / "ldm.safetensors"
    state, _ = read_weights(path)
    save_weights(path, state | {"scale": state["scale"].reshape(1)}, model.config.unet)
    assert torch.equal(RefinedAudioLDM.load(tmp_path).scale, model.scale)
    for changes, message in (({"scale": torch.ones(2)}, "scale is of"), ({"scale": None}, "scale, unet were expected"),
                          ({"unet.conv_in.bias": None}, "1 missing: conv_in.bias")):  # fmt: skip
        changed = {k: v for k, v in (state | changes).items() if v is not None}
        save_weights(path, changed, model.config.unet)
        with pytest.raises(ValueError, match=f"ldm.safetensors.*{message}"):
            RefinedAudioLDM.load(tmp_path)


def test_a_vocoder_of_another_size_is_refused(tmp_path):
    generator = HiFiGAN(HiFiGANConfig(n_mels=16, channels=32, rates=(8, 5, 4), kernels=(16, 10, 8)))
    torch.save({"generator": generator.state_dict()}, tmp_path / "hifigan_48k.ckpt")
    with pytest.raises(ValueError, match=r"kernels are \(16, 10, 8\), those of 16 kHz and 64 bins are \(16, 16"):
        convert_checkpoint(tmp_path / "hifigan_48k.ckpt", tmp_path / "out.safetensors")
    vae = MelVAE(VAEConfig(2, 32, (1, 2), 1)).state_dict()
    torch.save({"state_dict": {k: v for k, v in vae.items() if k != "decoder.conv_in.bias"}}, tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match="vae.ckpt does not fit MelVAE: 1 missing: decoder.conv_in.bias"):
        convert_checkpoint(tmp_path / "vae.ckpt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
