import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """What IPython would show, as a list that grows."""
    items = []
    monkeypatch.setattr("IPython.display.display", items.append)
    return items
