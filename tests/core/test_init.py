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
