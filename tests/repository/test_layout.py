"""The layout is a contract: the root is the path of the sound, the rest are wings, and imports point one way."""

import shutil
import subprocess
import sys
from pathlib import Path

import refined_ldm

PACKAGE = Path(refined_ldm.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
WINGS = {"scenes", "data", "training", "durable", "published", "evaluation", "experiment", "display", "cli"}
BELOW = {"base", "adapters"}  # folders that the core imports
CORE = set(
    "audio mel clap towers tokenizer vae conditioning unet diffusion linear_denoiser hifigan discriminators "
    "long_sounds editing variations text_to_audio "
    "config weights model_folder inference devices randomness "
    "__init__ __main__".split()
)


def lint(folder: Path) -> subprocess.CompletedProcess:
    """The contract of pyproject.toml, checked for the package that lies in `folder`."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})


def test_imports_point_one_way():
    checked = lint(ROOT)
    assert checked.returncode == 0, checked.stdout


def test_a_wing_in_the_core_breaks_the_contract(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "refined_ldm", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    mel = tmp_path / "refined_ldm" / "mel.py"
    mel.write_text("from refined_ldm.evaluation import metrics\n" + mel.read_text())
    checked = lint(tmp_path)
    assert checked.returncode == 1
    assert "refined_ldm.mel -> refined_ldm.evaluation" in checked.stdout


def test_the_root_lists_the_path_of_the_sound_and_its_wings():
    assert {path.stem for path in PACKAGE.glob("*.py")} == CORE
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == WINGS | BELOW


def test_every_wing_has_one_door_that_says_what_lives_there():
    for wing in WINGS | BELOW:
        door = (PACKAGE / wing / "__init__.py").read_text()
        assert door.startswith('"""'), wing
        assert len(door.splitlines()) <= 40, wing
