"""Two processes train as one would with the batch of both, and one goes on where two stopped."""

import csv
import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from refined_ldm.audio import save_audio
from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli import commands as cli
from refined_ldm.data.batches import loader
from refined_ldm.durable.run_state import last_checkpoint
from refined_ldm.randomness import RankGenerator, draw
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.stages import one_caption_each, train_vae
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
    port = free_port()
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


def read_by_accelerate(arguments: list[str]) -> tuple[Namespace, dict[str, str]]:
    """The words after `accelerate launch` -> what Accelerate makes of them, the environment of its processes."""
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return read, prepare_multi_gpu_env(read)


def test_the_launch_file_for_one_machine_is_what_accelerate_reads():
    path = str(LAUNCH / "bf16.yaml")
    assert load_config_from_file(path).distributed_type == DistributedType.MULTI_GPU
    read, environment = read_by_accelerate(["--config_file", path, "-m", "refined_ldm", "train"])
    assert (read.num_processes, read.num_machines, read.multi_gpu) == (8, 1, True)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and read.training_script == "refined_ldm"


@pytest.mark.skipif(os.name != "posix", reason="Slurm is for Linux")
def test_the_launch_file_for_several_machines_starts_one_launcher_on_each(tmp_path):
    """A dry run: Slurm's commands are stand-ins, and Accelerate reads what each machine would start."""
    commands = {
        "scontrol": 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"',
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "accelerate": 'printf "%s\\n" "$@" end',
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    port = free_port()
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "MASTER_PORT": str(port)}
    slurm["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    words = ["-m", "refined_ldm", "train", "--preset", "paper", "--run", "runs/two words"]
    done = subprocess.run([LAUNCH / "slurm.sh", *words], env=os.environ | slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = [node.split("\n") for node in done.stdout.removesuffix("end\n").split("end\n")]
    assert len(started) == 2
    for rank, (command, *arguments) in enumerate(started):
        assert command == "launch" and arguments.pop() == ""
        read, environment = read_by_accelerate([w.replace("launch/", f"{LAUNCH}/") for w in arguments])
        assert (read.num_machines, read.num_processes, int(read.machine_rank)) == (2, 16, rank)
        assert (read.main_process_ip, int(read.main_process_port)) == ("node7", port)
        assert read.training_script_args == words[2:] and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
