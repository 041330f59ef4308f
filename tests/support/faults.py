"""Try to lose a training run: python -m tests.support.faults [--kills 50] [--others 4] [--soak MINUTES] [--seed 0]

Every trial trains one stage of a small model by `refined-ldm train` in a process of its own, does something bad to it,
goes on with --resume, and compares loss curve, weights, averages and optimiser with a run that nothing happened to.
What is not equal bit for bit, or leaves half a file behind, is lost. Processes are forked from one that has imported
everything, so that a trial takes a second or two.
"""

import argparse
import errno
import io
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from safetensors.torch import load

from refined_ldm import weights
from refined_ldm.audio import save_audio
from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli import commands as cli
from refined_ldm.devices import pick_precision
from refined_ldm.discriminators import DiscriminatorsConfig
from refined_ldm.durable import csv_log, run_state  # noqa: F401  (forked with all imported)
from refined_ldm.model_folder import part_path
from refined_ldm.published.warm_start import PARTS
from refined_ldm.tokenizer import TOKENIZERS
from tests.support import small
from tests.support.accelerators import forget_accelerators

STEPS = 8


# --- one process ---


def start(arguments, log, before=None):
    """Fork `refined-ldm ARGUMENTS`, its output going to the file `log` -> process id. before() runs in the child."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            if before:
                before()
            status = cli.main([str(a) for a in arguments])
            sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(status)


def wait(process):
    """-> exit status, negative the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class FileEvents:
    """Call `act` in this process at the n-th time that it opens, makes, renames or removes something below `folder`."""

    NAMES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

    def __init__(self, folder, number, act):
        self.folder, self.left, self.act = str(folder), number, act

    def __call__(self):
        sys.addaudithook(self.see)

    def see(self, event, arguments):
        if self.left and event in self.NAMES and str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if not self.left:
                self.act()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torn(number, share):
    """Die while the number-th file of tensors is written, of which a share is on disk."""
    save_file, left = run_state.save_file, [number]

    def save(tensors, path, **options):
        save_file(tensors, path, **options)
        left[0] -= 1
        if not left[0]:
            os.truncate(path, int(share * os.path.getsize(path)))
            die()

    run_state.save_file = weights.save_file = save


# --- the runs that nothing happens to, and what is compared ---


class Campaign:
    def __init__(self, root, seed, stages=PARTS):
        self.root, self.dice, self.stages = Path(root), random.Random(seed), stages
        self.counts, self.lost, self.number = Counter(), [], 0
        (self.root / "recordings").mkdir()
        for i, item in enumerate(small.clips(10)):
            save_audio(self.root / "recordings" / f"bell_{i}.wav", item["waveform"])
        stage = replace(small.STAGE, max_steps=STEPS, save_every=2, ema_decay=0.9)
        training = {"vae": replace(stage, crop_frames=16), "clap": replace(stage, ema_decay=0.0),
                    "ldm": replace(stage, optimizer="muon"), "hifigan": replace(stage, crop_frames=16)}  # fmt: skip
        self.config = small.config(data=str(self.root / "recordings"), training=training,
                                   discriminators=DiscriminatorsConfig(width=4, periods=(2,), scales=1))  # fmt: skip
        self.config.save(self.root / "small.yaml")
        with redirect_stdout(io.StringIO()):  # once in this process, so that those forked from it need no imports
            cli.main([str(a) for a in self.command(self.stages[0], self.root / "warm-up", "--max-steps", "1")])
        forget_accelerators()
        self.seconds = {}
        for stage in self.stages:
            began = time.perf_counter()
            if wait(start(self.command(stage, self.root / "unbroken"), self.root / "log")):
                raise SystemExit(f"the unbroken run of {stage} failed:\n{(self.root / 'log').read_text()}")
            self.seconds[stage] = time.perf_counter() - began
        self.expected = {stage: self.outcome(stage, self.root / "unbroken") for stage in self.stages}

    def command(self, stage, run, *more):
        return ["train", "-c", self.root / "small.yaml", "--run", run, "--stage", stage, "--device", "cpu", *more]

    def outcome(self, stage, run):
        """All that a finished stage left behind: {what: lines, or tensors by name}."""
        newest = run_state.last_checkpoint(run / "checkpoints", stage)
        rows = [line.split(",") for line in (run / f"{stage}.csv").read_text().splitlines()]
        found = {"curve": [row[:2] + row[3:] for row in rows], "checkpoint": newest.name}  # without the seconds
        for path in (part_path(run, stage, self.config), *newest.glob("*.safetensors")):
            found[str(path.relative_to(run))] = load(path.read_bytes())  # load_file would lose memory
        return found

    def faults(self, stage, run):
        """What is wrong with a finished run, [] if it is the unbroken one bit for bit and nothing else lies about."""
        try:
            found = self.outcome(stage, run)
        except Exception as fault:
            return [f"unreadable: {fault}"]
        problems = [
            f"{what} differs" for what, value in self.expected[stage].items() if not same(value, found.get(what))
        ]
        left = [path.name for path in run.rglob("*") if path.name.endswith((".tmp", ".partial"))]
        kept = sorted(path.name for path in (run / "checkpoints" / stage).glob("step-*"))
        if len(kept) > 2 or kept[-1] != f"step-{STEPS:07d}":  # the other may be one that a signal asked for
            problems.append(f"checkpoints kept: {kept}")
        return problems + [f"left behind: {left}"] * bool(left)

    # --- trials ---

    def prepare(self, stage, folder=None):
        """A fresh run folder with what the stage needs from those before it, and sometimes with the clips."""
        self.number += 1
        run = (folder or self.root) / f"run-{self.number}"
        run.mkdir()
        if stage == "ldm":
            for part in ("vae", "clap"):
                shutil.copy(part_path(self.root / "unbroken", part, self.config), run)
        if self.dice.random() < 0.5:
            shutil.copytree(self.root / "unbroken" / "clips-train", run / "clips-train")
        return run

    def log(self):
        return (self.root / "log").read_text()

    def go(self, arguments, before=None):
        """Run a command to its end -> exit status."""
        return wait(start(arguments, self.root / "log", before))

    def settle(self, kind, stage, run, problems=()):
        """Go on with a run to its end and count it as survived, or as lost if anything is not as it should be."""
        problems = list(problems)
        if status := self.go(self.command(stage, run, "--resume")):
            problems.append(f"--resume ended with {status}: {self.log()[-300:]}")
        problems += self.faults(stage, run)
        self.counts[kind, bool(problems)] += 1
        if problems:
            self.lost.append(f"{kind} in {stage}, {run.name}: {'; '.join(problems)}")
            print("LOST", self.lost[-1], flush=True)
        else:
            shutil.rmtree(run)

    def killed(self, stage, run, *more):
        """Start a stage and have it die at a random moment -> what hit it, or None if it was finished before."""
        how, arguments = self.dice.choice(["moment", "file", "torn"]), self.command(stage, run, *more)
        if how == "moment":
            process = start(arguments, self.root / "log")
            time.sleep(self.dice.uniform(0, self.seconds[stage]))
            os.kill(process, signal.SIGKILL)
            status = wait(process)
        elif how == "file":
            status = self.go(arguments, FileEvents(run, self.dice.randint(1, 120), die))
        else:
            number, share = self.dice.randint(1, 12), self.dice.random()
            status = self.go(arguments, lambda: torn(number, share))
        return how if status == -signal.SIGKILL else None

    def kill(self):
        """kill -9 at a random moment of a random stage; of every third run again while it goes on."""
        stage = self.dice.choice(self.stages)
        run = self.prepare(stage)
        if not (how := self.killed(stage, run)):
            shutil.rmtree(run)  # it was finished before: no kill
            return False
        while self.dice.random() < 1 / 3 and self.killed(stage, run, "--resume"):
            how = "again"
        self.settle({"moment": "kill -9, any moment", "file": "kill -9, between two file operations",
                     "torn": "kill -9, half a file of tensors written", "again": "kill -9, more than once"}[how],
                    stage, run)  # fmt: skip
        return True

    def stop(self):
        """Ctrl-C or SIGTERM: the last finished step is saved, and the one line tells the command that goes on."""
        stage, number = self.dice.choice(self.stages), self.dice.choice([signal.SIGINT, signal.SIGTERM])
        run = self.prepare(stage)
        process = start(self.command(stage, run), self.root / "log")
        time.sleep(self.dice.uniform(0.1, self.seconds[stage]))
        os.kill(process, number)
        status, problems, lines = wait(process), [], self.log().strip().splitlines()
        if status == 0:  # it was finished before
            shutil.rmtree(run)
            return False
        if status != 128 + number or not re.search(r"stopped .*; go on with: refined-ldm train", lines[-1]):
            problems.append(f"status {status}, printed {lines}")
        elif " saved in " in lines[-1]:
            steps = [int(line.split(",")[0]) for line in (run / f"{stage}.csv").read_text().splitlines()[1:]]
            saved = run_state.last_checkpoint(run / "checkpoints", stage).name
            if saved != f"step-{steps[-1]:07d}":
                problems.append(f"step {steps[-1]} was printed, {saved} is saved")
            going_on = [str(word) for word in self.command(stage, run, "--resume")]
            if shlex.split(lines[-1].split("go on with: ")[1])[1:] != going_on:
                problems.append(f"not the command that goes on: {lines[-1]}")
        self.settle(signal.Signals(number).name, stage, run, problems)
        return True

    def damage(self):
        """A file of the newest checkpoint is cut, emptied, removed or has one bit flipped."""
        stage = self.dice.choice(self.stages)
        run = self.prepare(stage)
        self.go(self.command(stage, run), FileEvents(run / "checkpoints" / stage, self.dice.randint(40, 80), die))
        newest = run_state.last_checkpoint(run / "checkpoints", stage)
        if newest is None:
            shutil.rmtree(run)
            return False
        path = self.dice.choice(sorted(newest.iterdir()))
        contents, how = path.read_bytes(), self.dice.choice(["cut", "emptied", "removed", "flipped"])
        place = self.dice.randrange(len(contents))
        if how == "removed":
            path.unlink()
        elif how == "flipped" and path.suffix == ".safetensors":
            path.write_bytes(contents[:place] + bytes([contents[place] ^ 1 << self.dice.randrange(8)])
                             + contents[place + 1 :])  # fmt: skip
        else:
            path.write_bytes(contents[:place] if how == "cut" else b"")
        self.go(self.command(stage, run, "--resume"))
        problems = (
            [] if f"{newest} is damaged" in self.log() else [f"nothing said of {path} ({how}): {self.log()[-300:]}"]
        )
        self.settle("damaged checkpoint", stage, run, problems)
        return True

    def refused(self, run, status, checkpoints):
        """What is wrong with how a command ended that could not write."""
        problems, lines = [], [line for line in self.log().splitlines() if line and "Warning" not in line]
        if status != 2 or len(lines) != 1 or not lines[0].startswith("refined-ldm train: ["):
            problems.append(f"status {status}, printed {lines}")
        left = [path.name for path in run.rglob("*") if path.name.endswith(".tmp")]
        gone = [path for path in checkpoints if not path.is_dir()]
        return problems + [f"left behind: {left}"] * bool(left) + [f"gone: {gone}"] * bool(gone)

    def full(self):
        """The disk is full at a random file operation."""
        stage = self.dice.choice(self.stages)
        run = self.prepare(stage)
        status = self.go(self.command(stage, run), FileEvents(run, self.dice.randint(1, 120), disk_full))
        if status == 0:
            shutil.rmtree(run)
            return False
        self.settle("disk full, injected", stage, run, self.refused(run, status, []))
        return True

    def mounted(self, size):
        """A small disk of its own, or None where only root may have one."""
        folder = self.root / "disk"
        folder.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder], capture_output=True)
        return None if made.returncode else folder

    def small_disk(self):
        """A disk that is really too small, then larger."""
        stage = self.dice.choice(self.stages)
        full = sum(p.stat().st_size for p in (self.root / "unbroken").rglob("*") if stage in str(p)) // 1024
        if not (folder := self.mounted(self.dice.randint(full // 8, full))):
            return None
        try:
            try:
                run = self.prepare(stage, folder)
            except OSError:  # not even what the stage needs
                return False
            status = self.go(self.command(stage, run))
            if status == 0:
                return False
            problems = self.refused(run, status, [])
            subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
            self.settle("disk full, a small tmpfs", stage, run, problems)
            return True
        finally:
            subprocess.run(["umount", folder], check=True)

    def read_only(self):
        """A run is to go on in a folder that cannot be written to, then can."""
        stage = self.dice.choice(self.stages)
        if not (folder := self.mounted(256 * 1024)):
            return None
        try:
            run = self.prepare(stage, folder)
            self.go(self.command(stage, run), FileEvents(run, self.dice.randint(1, 120), die))
            kept = list((run / "checkpoints" / stage).glob("step-*"))
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            status = self.go(self.command(stage, run, "--resume"))
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            if status == 0:
                return False
            left = {path for path in run.rglob("*.tmp")}  # the kill's; nothing could remove them
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.settle("read-only folder", stage, run, self.refused(run, status, kept))
            return True
        finally:
            subprocess.run(["umount", folder], check=True)

    def table(self):
        kinds = sorted({kind for kind, _ in self.counts})
        rows = [(kind, self.counts[kind, False] + self.counts[kind, True], self.counts[kind, False],
                 self.counts[kind, True]) for kind in kinds]  # fmt: skip
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        rows.insert(0, ("fault", "tried", "survived", "lost"))
        return "\n".join(f"{kind:45}{tried:>8}{survived:>10}{lost:>6}" for kind, tried, survived, lost in rows)


def same(a, b):
    if not isinstance(a, dict):
        return a == b
    return isinstance(b, dict) and a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)  # fmt: skip


def repeat(trial, times):
    """Have `trial` hit `times` times; it gives False when the run was finished before, None when it cannot be tried."""
    hits = 0
    while hits < times:
        hit = trial()
        if hit is None:
            print(f"not tried, for want of rights: {trial.__doc__}")
            return
        hits += hit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--others", type=int, default=4, help="of each other fault")
    parser.add_argument("--stages", nargs="+", default=PARTS, choices=PARTS, help="vae and clap go before ldm")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    CLAP_PRESETS["tiny-gpt2"] = small.CLAP
    TOKENIZERS["gpt2"] = cache(TOKENIZERS["gpt2"])
    pick_precision("cpu"), TOKENIZERS["gpt2"](None)  # once, not in every process
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        began = time.perf_counter()
        campaign = Campaign(root, options.seed, options.stages)
        seconds = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in campaign.seconds.items())
        print(f"unbroken: {seconds}", flush=True)
        if options.soak:
            from tests.support import soak

            soak.main(campaign, options.soak)
            options.kills = options.others = 0
        repeat(campaign.kill, options.kills)
        for trial in (campaign.stop, campaign.damage, campaign.full, campaign.small_disk, campaign.read_only):
            repeat(trial, options.others)
        print(f"{campaign.table()}\n{time.perf_counter() - began:.0f} s, seed {options.seed}")
        print(*campaign.lost, sep="\n")
        return 1 if campaign.lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
