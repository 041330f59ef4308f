"""Two processes train as one would with the batch of both, and one goes on where two stopped."""

import csv
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from refined_ldm.audio import save_audio
from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli import commands as cli
from refined_ldm.config import preset
from refined_ldm.data.batches import loader
from refined_ldm.durable.run_state import last_checkpoint
from refined_ldm.randomness import RankGenerator, draw
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.stages import one_caption_each, train_vae
from refined_ldm.unet import UNet
from tests.support import launched, small

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setitem(CLAP_PRESETS, "tiny-gpt2", small.CLAP)
    launched.use_small_model(monkeypatch.setattr)
    for i, item in enumerate(small.clips(10)):
        save_audio(tmp_path / "recordings" / f"bell_{i}.wav", item["waveform"])
    stage = replace(small.STAGE, lr_schedule="constant", save_every=2)
    training = {name: replace(stage, crop_frames=16) for name in ("vae", "hifigan")} | {
        "clap": stage, "ldm": replace(stage, optimizer="muon", ema_decay=0.9)}  # fmt: skip
    small.config(data=str(tmp_path / "recordings"), training=training).save(tmp_path / "small.yaml")
    return tmp_path / "small.yaml"


def curves(run):
    return {path.stem: list(csv.reader(path.open())) for path in sorted(run.glob("*.csv"))}


def test_two_processes_train_as_one_and_either_goes_on(settings, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)  # tests before this one may train in bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as the two are launched

    def command(run, stages, *more):
        words = ["train", "-c", settings, "--run", tmp_path / run, "--device", "cpu", "--stage", *stages, *more]
        return [str(word) for word in words]

    assert cli.main(command("one", ["vae", "clap", "ldm", "hifigan"])) == 0
    assert cli.main(command("two", ["vae", "clap"], "--max-steps", "2")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
             str(port), "--module", launched.__name__, *command("two", ["vae", "clap"], "--resume"), "--",
             *command("two", ["ldm", "hifigan"])]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=LAUNCH.parent)
    lines = re.sub(", [0-9]+% of the time waiting for data", "", done.stdout).splitlines()
    assert done.returncode == 0, done.stderr
    assert sorted(lines) == sorted(["statuses 0 143"] * 2 + [
        f"{stage}: 6 steps, loss {float(rows[-1][3]):.4f}, written to {tmp_path / 'two'}"
        for stage, rows in curves(tmp_path / "two").items() if stage != "hifigan"])  # fmt: skip
    assert last_checkpoint(tmp_path / "two" / "checkpoints", "hifigan").name == "step-0000003"  # both stopped there
    assert done.stderr.count("stopped after step 3 of hifigan, saved in") == 1
    assert cli.main(command("two", ["hifigan"], "--resume")) == 0
    for stage, rows in curves(tmp_path / "one").items():
        found = curves(tmp_path / "two")[stage]
        assert found[0] == rows[0] and [row[0] for row in found] == [row[0] for row in rows]
        for one, two in zip(rows[1:], found[1:], strict=True):
            assert [float(x) for x in two[3:]] == pytest.approx([float(x) for x in one[3:]], rel=1e-4), (stage, one[0])


@pytest.mark.parametrize("make", [torch.rand, torch.randn])
def test_shares_of_a_draw_are_the_draw(make):
    whole = draw(make, (6, 3), torch.Generator().manual_seed(5))
    assert torch.equal(whole, make((6, 3), generator=torch.Generator().manual_seed(5)))
    shares = [draw(make, (2, 3), RankGenerator(share, 3).manual_seed(5)) for share in range(3)]
    assert torch.equal(torch.cat(shares), whole)


def test_shares_of_the_captions_are_those_of_the_whole_batch():
    captions = [[f"{i}{letter}" for letter in "abcde"[: 2 + i % 4]] for i in range(12)]

    def chosen(share, shares):
        own = captions[share * 12 // shares : (share + 1) * 12 // shares]
        return one_caption_each(own, RankGenerator(share, shares).manual_seed(5))

    whole, shares = chosen(0, 1), [chosen(share, 3) for share in range(3)]
    assert sum(shares, []) == whole and len({caption[-1] for caption in whole}) > 2


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    small.use_small_clap(monkeypatch)
    model, three = RefinedAudioLDM(small.config()), SimpleNamespace(num_processes=3, is_main_process=True)
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared by 3 processes: take 6"):
        next(train_vae(model, loader(small.clips(), 4), accelerator=three))


@pytest.mark.parametrize("name", ["bf16", "fsdp"])
def test_launch_files_are_what_accelerate_reads(name, monkeypatch):
    """A dry run: the file becomes Accelerate's configuration, the launcher's environment and, of FSDP, the plugin."""
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "refined_ldm", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "bf16":
        assert config.distributed_type == DistributedType.MULTI_GPU and arguments.multi_gpu
        return
    assert config.distributed_type == DistributedType.FSDP and arguments.use_fsdp
    plugin = FullyShardedDataParallelPlugin()  # from the environment, as Accelerator() makes it
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    unet = UNet(preset("paper").unet)
    plugin.set_auto_wrap_policy(unet)
    wrapped = [m for m in unet.modules() if plugin.auto_wrap_policy(module=m, recurse=False, nonwrapped_numel=10**9)]
    assert {type(m).__name__ for m in wrapped} == {"ResBlock", "Transformer"}
    share = sum(p.numel() for m in wrapped for p in m.parameters()) / sum(p.numel() for p in unet.parameters())
    assert share > 0.8
