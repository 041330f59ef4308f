"""The short form of `make faults`, and that the campaign would see a loss."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import faults

ROOT = Path(__file__).parents[2]


def test_a_few_kills_and_one_of_each_other_fault():
    faults = ["-m", "tests.support.faults", "--kills", "3", "--others", "1", "--stages", "vae"]
    done = subprocess.run([sys.executable, *faults], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in done.stdout.splitlines() if line.startswith("all "))
    tried, survived, lost = map(int, total.split()[1:])
    assert tried >= 6 and survived == tried and lost == 0


def finished(run):
    """What a finished run leaves behind, in small."""
    for step in ("step-0000006", "step-0000008"):
        (run / "checkpoints" / "vae" / step).mkdir(parents=True)
        save_file({"a": torch.ones(3)}, run / "checkpoints" / "vae" / step / "vae.safetensors")
    save_file({"a": torch.ones(3)}, run / "vae.safetensors")
    (run / "vae.csv").write_text("step,lr,seconds,loss\n1,0.1,0.02,0.5\n")
    return run


@pytest.mark.parametrize("loss, message", [
    (lambda run: (run / "vae.csv").write_text("step,lr,seconds,loss\n1,0.1,0.09,0.50000001\n"), "curve differs"),
    (lambda run: (run / "vae.csv").write_text("step,lr,seconds,loss\n"), "curve differs"),
    (lambda run: save_file({"a": torch.tensor([1, 1, 1 + 1e-7])}, run / "vae.safetensors"), "vae.safetensors differs"),
    (lambda run: (run / "vae.safetensors").unlink(), "unreadable"),
    (lambda run: (run / ".refined-ldm-x.tmp").mkdir(), "left behind: ['.refined-ldm-x.tmp']"),
    (lambda run: (run / "checkpoints" / "vae" / "step-0000004").mkdir(), "checkpoints kept"),
    (lambda run: (run / "checkpoints" / "vae" / "step-0000008").rename(run / "gone"), "checkpoint differs"),
])  # fmt: skip
def test_a_loss_is_seen(tmp_path, loss, message):
    campaign = faults.Campaign.__new__(faults.Campaign)
    campaign.config, run = faults.small.config(), finished(tmp_path / "run")
    campaign.expected = {"vae": campaign.outcome("vae", finished(tmp_path / "unbroken"))}
    assert campaign.faults("vae", run) == []
    loss(run)
    assert message in "; ".join(campaign.faults("vae", run))
