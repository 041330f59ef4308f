import pandas as pd

from tests.benchmark import goals


def test_a_part_replaces_its_own_rows_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(goals, "PARTS", {
        "one": lambda before: [goals.row("one", "walking", 2.0, "running", 1.0 if before is None else 6.0, 2.5)],
        "two": lambda before: [goals.row("two", "sitting", 1.0, "standing", 4.0, None)],
    })  # fmt: skip
    table = tmp_path / "table.csv"
    goals.main([], table)
    goals.main(["one", "--before", "earlier"], table)
    found = pd.read_csv(table).set_index("name")
    assert found["ratio"].to_dict() == {"one": 3.0, "two": 4.0} and len(found) == 2
    assert found["command"]["one"] == "python -m tests.benchmark.goals one" and found["goal"]["one"] == 2.5
    assert "walking" in capsys.readouterr().out


def test_seconds_are_of_the_processor_alone():
    assert goals.seconds(lambda: goals.time.sleep(0.3)) < 0.1 < goals.seconds(lambda: sum(range(10**7)))
    assert 0 < goals.process(["-c", "import time; time.sleep(1)"]) < 0.9
