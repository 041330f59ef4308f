import os
import re
import subprocess
import sys

import pytest

import refined_ldm

QUICK = """
import sys, time
start = time.process_time()
import refined_ldm
took = time.process_time() - start
heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib", "librosa", "accelerate"} & set(sys.modules)
assert not heavy, heavy
assert took < 0.3, took
"""


def test_import_is_silent_quick_and_loads_no_torch():
    done = subprocess.run([sys.executable, "-W", "error", "-c", QUICK], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def process(code, **given):
    """A process whose user has set no policy, or the `given` one."""
    outside = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    return subprocess.run([sys.executable, "-c", code], env=outside | given, capture_output=True, text=True, check=True)


AS_TORCH_IS_LOOKED_FOR = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("given, spins", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
@pytest.mark.parametrize("code", ["import refined_ldm, torch", "from refined_ldm.cli import main; import numpy, torch",
                                  "from refined_ldm import NoiseSchedule"])  # fmt: skip
def test_torchs_threads_sleep_while_they_wait_unless_the_user_says_otherwise(code, given, spins):
    """Spinning threads make everything several times slower beside one busy process."""
    assert process(AS_TORCH_IS_LOOKED_FOR + code, **given).stdout == f"{spins}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what GNU's OpenMP says of itself")
def test_torchs_openmp_reads_what_was_set():
    done = process("from refined_ldm.cli import main; import numpy, torch", OMP_DISPLAY_ENV="true")
    assert re.findall(r"OMP_WAIT_POLICY = '(\w+)'", done.stderr) == ["PASSIVE"]


def test_every_public_name_is_there():
    for name in refined_ldm.__all__:
        value = getattr(refined_ldm, name)
        assert value.__module__.startswith("refined_ldm.") if hasattr(value, "__module__") else value
    assert set(refined_ldm.__all__) <= set(dir(refined_ldm))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No refined_ldm attribute Diffusion"):
        _ = refined_ldm.Diffusion


def test_version_is_a_version():
    assert all(part.isdigit() for part in refined_ldm.__version__.split("."))
