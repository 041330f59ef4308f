"""A small table of runs."""

import pandas as pd

TABLE = pd.DataFrame({
    "label": ["B"] * 3 + ["C"] * 3, "seed": [0, 1, 2, 2, 1, 0], "frechet": [100.0, 110, 120, 90, 85, 80],
})  # fmt: skip
