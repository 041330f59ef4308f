"""What accelerate starts in test_scale_out: `refined-ldm` commands in turn, separated by "--", with the small model.

The second process sends itself SIGTERM after the second step of the vocoder, and tells what it writes.
"""

import os
import signal
import sys
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm import towers
from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli import commands as cli
from refined_ldm.training import pipeline
from tests.support import small


def use_small_model(setattr=setattr):
    """The small conditioner without what every process has of its own: dropout, and batch norm of its share."""
    CLAP_PRESETS["tiny-gpt2"] = small.CLAP
    init = nn.Dropout.__init__
    setattr(nn.Dropout, "__init__", lambda self, p=0.5, inplace=False: init(self, 0.0, inplace))
    setattr(towers, "DROPOUT", 0.0)
    setattr(nn.BatchNorm2d, "forward", lambda self, x: F.batch_norm(x, self.running_mean, self.running_var,
                                                                    self.weight, self.bias))  # fmt: skip


def tell_writes(folder):
    def see(event, arguments):
        writes = event in ("os.mkdir", "os.rename") or (event == "open" and str(arguments[1])[:1] in "wax")
        if writes and str(arguments[0]).startswith(folder):
            print(f"the second process wrote {arguments[0]}", flush=True)

    sys.addaudithook(see)


def stopped_at_step_two(train_stage):
    def trained(*arguments, **settings):
        for step in train_stage(*arguments, **settings):
            if step.index == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    return trained


def main():
    torch.set_num_threads(1)
    use_small_model()
    if os.environ["RANK"] == "1":
        tell_writes(sys.argv[sys.argv.index("--run") + 1])
        pipeline.train_hifigan = stopped_at_step_two(pipeline.train_hifigan)
    commands = [list(words) for end, words in groupby(sys.argv[1:], lambda word: word == "--") if not end]
    statuses = " ".join(str(cli.main(command)) for command in commands)
    sys.stdout.write(f"statuses {statuses}\n")  # at once: two processes write to one pipe, unbuffered in some places
    sys.stdout.flush()


if __name__ == "__main__":
    main()
