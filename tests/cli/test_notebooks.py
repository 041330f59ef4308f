import nbformat
import pytest

from refined_ldm.cli.commands import main
from refined_ldm.cli.notebooks import execute_notebooks, find_notebooks, parameters_for

CELLS = ["clips = 3", "if clips < 2: raise ValueError('clips must be 2 or more')",
         "import os; print(os.environ.get('OMP_NUM_THREADS'), clips)"]  # fmt: skip


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A folder of two small notebooks, in place of the real ones."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name in ("01_small", "02_small"):
        cells = [nbformat.v4.new_code_cell(CELLS[0], metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source) for source in CELLS[1:]]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / f"{name}.ipynb")
    monkeypatch.setattr("refined_ldm.cli.notebooks.NOTEBOOKS", tmp_path)
    return tmp_path


def test_notebooks_are_found_by_number_and_by_name(two):
    assert [path.stem for path in find_notebooks()] == ["01_small", "02_small"]
    assert [path.stem for path in find_notebooks(["02"])] == ["02_small"] == [find_notebooks(["02_small"])[0].stem]
    with pytest.raises(FileNotFoundError, match="no notebook 3 in .*; there are 01_small, 02_small"):
        find_notebooks(["3", "01"])


def test_parameters_go_where_they_are_known(two):
    assert parameters_for(find_notebooks(["01"]), "tiny", {"clips": 5}) == {two / "01_small.ipynb": {"clips": 5}}
    with pytest.raises(ValueError, match="no notebook has a parameter colour; there are clips"):
        parameters_for(find_notebooks(), "tiny", {"colour": "red"})


@pytest.mark.parametrize("name, given, meant", [
    ("01", {"index": 5.0, "iterations": 3, "seed": 0.0}, {"index": 5, "iterations": 3, "seed": 0}),
    ("02", {"lr": 1, "max_steps": 10.0}, {"lr": 1, "max_steps": 10}),
    ("05", {"steps": 15.0, "write_figures": True}, {"steps": 15, "write_figures": True}),
])  # fmt: skip
def test_a_parameter_is_of_the_kind_that_the_notebook_gives_it(name, given, meant):
    ((found),) = parameters_for(find_notebooks([name]), "tiny", given).values()
    assert found == {"preset": "tiny", **meant}
    assert {key: type(found[key]) for key in meant} == {key: type(value) for key, value in meant.items()}


@pytest.mark.parametrize("name, value, told", [
    ("index", "5.5", "index must be a whole number, 0 or more, got 5.5"),
    ("index", "-1", "index must be a whole number, 0 or more, got -1"),
    ("index", "five", "index must be a whole number, 0 or more, got 'five'"),
    ("iterations", "true", "iterations must be a whole number, 0 or more, got True"),
    ("seed", "-1", "seed must be a whole number between 0 and 9223372036854775807, got -1"),
    ("lr", "NaN", "lr must be a finite number, got nan"), ("lr", "fast", "lr must be a finite number, got 'fast'"),
    ("write_figures", "1", "write_figures must be true or false, got 1"),
])  # fmt: skip
def test_a_parameter_that_cannot_be_meant_is_told_before_anything_runs(tmp_path, capsys, name, value, told):
    assert main(["notebooks", "-p", name, value, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr() == ("", f"refined-ldm notebooks: {told}\n") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_a_notebook_takes_whole_floats_for_all_its_integers(path):
    cells = {tag: cell for cell in nbformat.read(path, as_version=4).cells for tag in cell.metadata.get("tags", [])}
    (whole,) = [c for c in nbformat.read(path, as_version=4).cells if "whole_numbers(" in c.source]
    given = {}
    exec(cells["parameters"].source, given)
    integers = {name: value for name, value in given.items() if type(value) is int}
    assert integers
    for name in integers:
        changed = given | {other: float(value) for other, value in integers.items()}
        exec(whole.source, changed)
        assert {k: changed[k] for k in integers} == integers and all(type(changed[k]) is int for k in integers)
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            exec(whole.source, given | {name: 2.5})


def test_a_notebook_that_fails_is_told_in_one_line(two, capsys):
    assert main(["notebooks", "01", "-p", "clips", "1", "--out", str(two / "out")]) == 2
    printed, errors = capsys.readouterr()
    assert not printed and errors.splitlines()[-1] == (
        "refined-ldm notebooks: 01_small stopped at cell 3, ValueError: clips must be 2 or more; "
        f"see {two / 'out' / '01_small.ipynb'}"
    )
    assert main(["notebooks", "01", "--out", str(two / "out")]) == 0


def test_several_run_at_once_and_share_the_cores(two, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    done = {}
    execute_notebooks(dict.fromkeys(find_notebooks(), {"clips": 4}), two / "out", 2, done.__setitem__)
    assert {path.stem for path in done} == {"01_small", "02_small"} and min(done.values()) > 0
    for path in done:
        executed = nbformat.read(two / "out" / path.name, as_version=4)
        assert executed.cells[-1].outputs[0].text == "3 4\n"  # threads, and the parameter
    with pytest.raises(ValueError, match="_small stopped at cell 3"):
        execute_notebooks(dict.fromkeys(find_notebooks(), {"clips": 1}), two / "out", 2, done.__setitem__)
