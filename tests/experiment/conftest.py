import shutil

import pytest

from refined_ldm.experiment.protocol import open_experiment

SIZES = {"clips": 24, "held_out": 4, "test_size": 6, "probe": 96}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of an experiment with its clips, latents and probe."""
    folder = tmp_path_factory.mktemp("prepared")
    open_experiment(folder, **SIZES).probed()
    return folder


@pytest.fixture(scope="module")
def small(prepared, tmp_path_factory):
    """An experiment of a few clips, in a folder of the module's own."""
    return open_experiment(shutil.copytree(prepared, tmp_path_factory.mktemp("experiment") / "run"), **SIZES)
