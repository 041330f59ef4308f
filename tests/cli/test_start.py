"""What a process imports: the seconds before anything happens."""

import subprocess
import sys

import pytest

from refined_ldm.model_folder import WEIGHTS

HEAVY = {"accelerate", "diffusers", "gradio", "librosa", "matplotlib", "pandas", "peft", "scipy", "sklearn",
         "torch._dynamo", "torchvision", "transformers"}  # fmt: skip
CODE = f"""
import sys
from refined_ldm.cli.commands import main
status = main(sys.argv[1:])
print(status, sorted({HEAVY} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["generate", "a dog barks", "--out", "sounds"], ["inspect", str(WEIGHTS / "tiny")]]
)
def test_a_command_imports_only_what_it_uses(arguments, tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stderr
    assert arguments[0] == "inspect" or list(tmp_path.glob("sounds/*.wav"))
