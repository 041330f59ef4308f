"""The short form of `make faults`, and that it would see a loss."""

import subprocess
import sys
from pathlib import Path

import faults

CAMPAIGN = Path(faults.__file__)


def test_a_few_kills_and_one_of_each_other_fault():
    done = subprocess.run([sys.executable, str(CAMPAIGN), "--kills", "3", "--others", "1", "--seed", "1"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in done.stdout.splitlines() if line.startswith("all "))
    tried, survived, lost = map(int, total.split()[1:])
    assert tried >= 6 and survived == tried and lost == 0
