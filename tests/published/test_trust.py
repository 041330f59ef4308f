"""Nothing that is given is executed, imported or fetched because it says so, and the lab stays at home."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import refined_ldm
from refined_ldm.clap import CLAP_PRESETS
from refined_ldm.cli.arguments import EXAMPLES
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import published_yaml, small
from tests.support.recordings import record
from tests.support.shell import run

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(refined_ldm.__file__).parent
COMMANDS = list(EXAMPLES)
TRAIN = ("train", "-c", "c.yaml", "--device", "cpu")
INFER = ("infer", "-c", "c.yaml", "-l", "list.lst", "--device", "cpu")


class Asks:
    """A pickle of this runs a command when an unsafe reader loads it."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """A small model in run/, its settings in c.yaml, and evil.ckpt, which would write RAN if it were executed."""
    monkeypatch.chdir(tmp_path)
    small.use_small_clap(monkeypatch)
    monkeypatch.setitem(CLAP_PRESETS, "ms-clap-2023", small.CLAP)
    model = RefinedAudioLDM(small.config(), seed=2).eval()
    model.save("run")
    model.config.save("c.yaml")
    Path("list.lst").write_text("rain")
    for i in range(3):
        record(tmp_path / "sounds" / f"{i}.wav", seed=i)
        record(tmp_path / "others" / f"{i}.wav", seed=i + 3)
    torch.save({"state_dict": {"conv_pre.weight": torch.ones(2), "b": Asks()}}, "evil.ckpt")
    yield tmp_path
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("arguments, settings", [
    (("inspect", "evil.ckpt"), {}),
    (("convert", "evil.ckpt", "out.safetensors"), {}),
    ((*INFER, "--reload_from_ckpt", "evil.ckpt"), {}),
    ((*INFER, "--reload_from_ckpt", "run", "--clap-checkpoint", "evil.ckpt"), {"clap": "ms-clap-2023"}),
    ((*TRAIN, "--stage", "ldm", "--reload_from_ckpt", "evil.ckpt"), {}),
    ((*TRAIN, "--stage", "clap", "--clap-checkpoint", "evil.ckpt"), {}),
    ((*TRAIN, "--stage", "ldm"), {"start_from": "evil.ckpt"}),
    ((*TRAIN, "--stage", "vae"), {"vae_checkpoint": "evil.ckpt"}),
    ((*TRAIN, "--stage", "hifigan"), {"vocoder_checkpoint": "evil.ckpt"}),
    *((("evaluate", "sounds", "others", "--embedding", ear, "--checkpoint", "evil.ckpt"), {})
      for ear in ("aisfx", "tiny-gpt2", "ms-clap-2023", "laion-clap", "panns", "vggish")),
], ids=str)  # fmt: skip
def test_a_pickle_is_refused_wherever_a_checkpoint_can_be_given(trapped, capsys, arguments, settings):
    conditioner = {"clap": "tiny-gpt2"} | settings
    small.config(**conditioner | {"data": "sounds"}).save("c.yaml")
    if conditioner["clap"] != "tiny-gpt2":  # the run has no file of its own: the given one is read
        Path("run", "clap-tiny-gpt2.safetensors").unlink()
        small.config(**conditioner).save("run/config.yaml")
    status, printed, errors = run(capsys, *arguments)
    assert status == 2 and "evil.ckpt" in errors[-1] and "Traceback" not in "".join(errors)
    assert re.search("was refused: it |is not a whole safetensors file of ours|sha256", errors[-1])


@pytest.mark.parametrize("part", ["vae", "ldm", "hifigan", "clap-tiny-gpt2"])
def test_a_pickle_under_the_name_of_a_part_is_refused(trapped, capsys, part):
    shutil.copy("evil.ckpt", f"run/{part}.safetensors")
    status, _, errors = run(capsys, "generate", "rain", "--checkpoint", "run", "--out", "o", "--device", "cpu")
    assert status == 2 and f"{part}.safetensors" in errors[-1]
    assert run(capsys, *INFER, "--reload_from_ckpt", "run")[0] == 2


def test_a_pickle_in_a_pipeline_or_a_checkpoint_of_a_run_is_refused(trapped, capsys):
    for part in ("unet", "vae", "vocoder", "text_encoder", "scheduler"):
        Path("pipeline", part).mkdir(parents=True)
        Path("pipeline", part, "config.json").write_text("{}")
        shutil.copy("evil.ckpt", f"pipeline/{part}/pytorch_model.bin")
    status, _, errors = run(capsys, "convert", "pipeline", "out")
    assert status == 2 and "asks to run os.system" in errors[-1]
    step = Path("trained/checkpoints/vae/step-0000003")
    assert run(capsys, *TRAIN, "--data", "sounds", "--stage", "vae", "--run", "trained", "--max-steps", 3)[0] == 0
    for file in step.glob("*.safetensors"):
        shutil.copy("evil.ckpt", file)
    Path("trained/vae.safetensors").unlink()  # else it would stay as it is
    with pytest.warns(UserWarning, match="step-0000003 is damaged"):
        run(capsys, *TRAIN, "--data", "sounds", "--stage", "vae", "--run", "trained", "--max-steps", 3, "--resume")


TAGS = ("!!python/object/apply:os.system ['touch RAN']", "!!python/object/new:os.system ['touch RAN']",
        "!!python/name:os.system", "!!python/module:os")  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_in_yaml_is_refused_wherever_settings_are_read(trapped, capsys, tag):
    Path("evil.yaml").write_text(f"preset: tiny\nname: {tag}\n")
    shutil.copy("evil.yaml", "run/config.yaml")
    Path("custom.yaml").write_text(published_yaml.CUSTOM + f"\nproject: {tag}\n")
    for arguments in (("train", "-c", "evil.yaml"), ("train", "-c", "custom.yaml"),
                      ("infer", "-c", "evil.yaml", "-l", "list.lst", "--reload_from_ckpt", "run"),
                      ("generate", "rain", "--checkpoint", "run", "--out", "o")):  # fmt: skip
        status, _, errors = run(capsys, *arguments)
        assert status == 2 and "is not plain YAML" in errors[-1] and len(errors) == 1


@pytest.mark.parametrize("target", ["os.system", "trap.Door", "subprocess.Popen"])
def test_a_target_in_yaml_is_not_imported(trapped, capsys, monkeypatch, target):
    Path("trap.py").write_text("open('RAN', 'w')")
    monkeypatch.syspath_prepend(str(trapped))
    published_yaml.write(trapped / "evil.yaml", {"model.target": target})
    status, _, errors = run(capsys, "train", "-c", "evil.yaml")
    assert status == 2 and f"model.target is '{target}': the only one known is" in errors[-1]
    assert "trap" not in sys.modules


def test_a_name_in_settings_cannot_lead_the_run_out_of_runs(trapped, capsys):
    Path("evil.yaml").write_text("preset: tiny\nname: ../../out")
    status, _, errors = run(capsys, "train", "-c", "evil.yaml")
    assert status == 2 and "name must be a plain name" in errors[-1] and not Path("runs").exists()


# --- what the code may do ---

NETWORK = {"socket", "http", "urllib", "requests", "httpx", "aiohttp", "huggingface_hub"}
PICKLES = {"pickle", "dill", "joblib", "shelve", "marshal"}
MAY = {
    "app": {"socket"},  # asks whether its port is free, on this machine alone
    "hub": {"huggingface_hub"},  # fetches
    "reference_clap": {"huggingface_hub"},  # switches it off
    "unpickling": {"pickle"},  # its own reader finds listed names alone
}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_executes_what_it_reads_or_fetches_but_hub(path):
    tree = ast.parse(path.read_text())
    assert not (NETWORK | PICKLES) & set(imported(tree)) - MAY.get(path.stem, set())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.unsafe_load"}
        assert not called.endswith((".extractall", ".extract", ".from_pretrained", "hub.load")), called
        own_reader = path.stem == "unpickling" and any(keyword.arg == "pickle_module" for keyword in node.keywords)
        if called == "torch.load" and not own_reader:
            assert {"weights_only": True} == {k.arg: k.value.value for k in node.keywords if k.arg == "weights_only"}
        if called.endswith("np.load"):
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords)


NO_SOCKET = """
import importlib, pkgutil, sys

def refuse(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
import refined_ldm
for module in pkgutil.walk_packages(refined_ldm.__path__, "refined_ldm.") if "all" in sys.argv else ():
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("which", ["package", pytest.param("all", marks=pytest.mark.slow)])
def test_no_socket_is_made_at_import(which):
    done = subprocess.run([sys.executable, "-c", NO_SOCKET, which], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


HELP = """
import sys
from refined_ldm.cli.commands import main
for command in sys.argv[1:]:
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
heavy = {"torch", "transformers", "numpy", "accelerate", "matplotlib", "papermill", "soundfile"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_of_every_command_imports_nothing_heavy():
    assert {"generate", "train", "infer", "evaluate", "inspect", "convert", "notebooks"} <= set(COMMANDS)
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("example: refined-ldm") == len(COMMANDS)


# --- JupyterLab ---


def lab_command():
    (line,) = re.findall(r"^\t\$\(BIN\)/(jupyter lab .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return line.split()


def test_the_lab_is_started_on_loopback_with_its_token():
    words = lab_command()
    assert words[words.index("--ip") + 1] == "127.0.0.1"
    assert not re.search("token|password|allow|origin|disable", " ".join(words))


@pytest.mark.slow
def test_the_lab_answers_here_alone_and_needs_its_token(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*lab_command()[1:-1], "--no-browser", "--allow-root", f"--ServerApp.port={port}", str(tmp_path)]
    home = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "c"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "r")}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", *words], stdout=log, stderr=log, env=home)
    try:
        status = None
        for _ in range(240):
            try:
                status = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents", timeout=5).status
                break
            except urllib.error.HTTPError as refused:
                status = refused.code
                break
            except OSError:
                time.sleep(0.25)
        assert status == 403
        token = re.search(r"token=(\w+)", (tmp_path / "log").read_text())[1]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents?token={token}", timeout=10).status == 200
        with pytest.raises(OSError):  # one that listens everywhere would answer here too
            socket.create_connection(("127.0.0.2", port), timeout=2).close()
    finally:
        server.terminate()
        server.wait(20)
