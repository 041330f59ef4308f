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
