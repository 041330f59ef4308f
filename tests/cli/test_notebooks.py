import ast
import os
import re

import nbformat
import pytest

from refined_ldm.cli.commands import main
from refined_ldm.cli.notebooks import (
    PATHS,
    WRITTEN,
    execute_notebook,
    execute_notebooks,
    find_notebooks,
    parameters_for,
    paths_from_here,
)

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


def test_parameters_go_to_the_notebooks_that_have_them(two):
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


@pytest.mark.parametrize("name, value, message", [
    ("index", "5.5", "index must be a whole number, 0 or more, got 5.5"),
    ("index", "-1", "index must be a whole number, 0 or more, got -1"),
    ("index", "five", "index must be a whole number, 0 or more, got 'five'"),
    ("iterations", "true", "iterations must be a whole number, 0 or more, got True"),
    ("seed", "-1", "seed must be a whole number between 0 and 9223372036854775807, got -1"),
    ("lr", "NaN", "lr must be a finite number, got nan"), ("lr", "fast", "lr must be a finite number, got 'fast'"),
    ("write_figures", "1", "write_figures must be true or false, got 1"),
    ("preset", "5", "preset must be a text, got 5"),
    ("preset", "huge", "no preset 'huge': choose one of tiny, colab, paper, baseline"),
])  # fmt: skip
def test_a_parameter_that_cannot_be_meant_is_reported_before_anything_runs(tmp_path, capsys, name, value, message):
    assert main(["notebooks", "-p", name, value, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr() == ("", f"refined-ldm notebooks: {message}\n") and not (tmp_path / "out").exists()


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


def parameters_of(path):
    """{parameter: its default} of a notebook."""
    (cell,) = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


def test_every_parameter_that_is_text_is_a_path_or_known_not_to_be():
    texts = {name for path in find_notebooks() for name, value in parameters_of(path).items() if isinstance(value, str)}
    assert texts - PATHS == {"preset", "parts"} and PATHS <= texts


def test_a_known_data_set_is_meant_from_where_the_command_is_run(tmp_path, monkeypatch):
    (tmp_path / "sets" / "clotho").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert paths_from_here({"data": "Clotho:sets/clotho"}) == {"data": f"clotho:{tmp_path}/sets/clotho"}
    with pytest.raises(FileNotFoundError, match=f"data is clotho:gone, and there is no {tmp_path}/gone"):
        paths_from_here({"data": "clotho:gone"})


@pytest.mark.parametrize("name", sorted(PATHS))
def test_paths_are_meant_from_where_the_command_is_run(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "sub" / "a.wav").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    there = str(tmp_path / "here" / "sub" / ("" if name in WRITTEN else "a.wav")).rstrip("/")
    below = os.path.relpath(there)
    for value in (below, f"./{below}", f"~/here/{below}", there):
        assert os.path.normpath(paths_from_here({name: value, "steps": 3})[name]) == there
    assert paths_from_here({name: "", "steps": 3}) == {name: "", "steps": 3}
    if name in WRITTEN:
        assert paths_from_here({name: "new"})[name] == str(tmp_path / "here" / "new")
        with pytest.raises(NotADirectoryError, match=r"a\.wav is a file, where a folder is needed"):
            paths_from_here({name: "sub/a.wav"})
    else:
        (tmp_path / "here" / "take [1].wav").touch()
        for value in ("sub/*.wav", "take [1].wav"):
            assert paths_from_here({name: value})[name] == str(tmp_path / "here" / value)
        for missing in ("sub/*.tar", "take [2].wav"):
            with pytest.raises(FileNotFoundError, match=f"{name} is {re.escape(missing)}, and there is no "):
                paths_from_here({name: missing})
        with pytest.raises(FileNotFoundError, match=f"{name} is nowhere, and there is no .*here/nowhere"):
            paths_from_here({name: "nowhere"})


def test_a_relative_path_reaches_the_notebook(two, tmp_path, monkeypatch, capsys):
    notebook = nbformat.read(two / "01_small.ipynb", 4)
    notebook.cells[0].source += '\nrecording = ""\ndata = ""'
    notebook.cells[2].source = "print(open(recording).read(), data)"
    nbformat.write(notebook, two / "01_small.ipynb")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "7").write_text("written")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["notebooks", "01", "--out", "out", "-p", "recording", "7", "-p", "data", "7"]) == 0  # no number
    executed = nbformat.read("out/01_small.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == f"written {tmp_path / 'elsewhere' / '7'}\n"
    assert main(["notebooks", "01", "--out", "out", "-p", "recording", "8"]) == 2
    assert capsys.readouterr().err.startswith("refined-ldm notebooks: recording is 8, and there is no ")


def test_a_kernels_threads_wait_as_those_of_the_command(two, monkeypatch):
    notebook = nbformat.read(two / "01_small.ipynb", 4)
    notebook.cells[2].source = "import os; print(os.environ['OMP_WAIT_POLICY'])"
    nbformat.write(notebook, two / "01_small.ipynb")
    assert os.environ["OMP_WAIT_POLICY"]  # set as the package was imported: tests/core/test_init.py
    (two / "out").mkdir()
    for policy in ("PASSIVE", "ACTIVE"):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        execute_notebook(two / "01_small.ipynb", {}, two / "out")
        assert nbformat.read(two / "out" / "01_small.ipynb", 4).cells[-1].outputs[0].text == f"{policy}\n"


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_a_notebook_imports_the_package_before_torch(path):
    """So that it says how torch's threads wait, whoever starts the kernel."""
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    first = code.index('importlib.import_module("refined_ldm")')
    assert not re.search(r"^\s*(import|from) (torch|numpy|matplotlib|refined_ldm)\b", code[:first], re.MULTILINE)


def test_a_kernel_that_dies_is_reported_in_one_line(two, capsys):
    notebook = nbformat.read(two / "01_small.ipynb", 4)
    notebook.cells[1].source = "import os; os._exit(1)"  # as the system ends what takes too much memory
    nbformat.write(notebook, two / "01_small.ipynb")
    assert main(["notebooks", "01", "--out", str(two / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "refined-ldm notebooks: 01_small: its kernel died, perhaps of too little memory; "
        f"see {two / 'out' / '01_small.ipynb'}"
    )


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_no_notebook_stops_at_how_good_a_model_is(path):
    """What a weak model does is reported (`display.report_unless`); assertions are of what always holds."""
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    of_quality = r"generated|shuffled|recall\[|distance\[|score\[|by_name.*(<|>)|shipped|near\[|lower\[|linear formula"
    assert not [line for line in code.splitlines() if re.search(rf"^\s*assert .*({of_quality})", line)
                and "and it is the real one" not in line]  # fmt: skip


def test_a_notebook_that_fails_is_reported_in_one_line(two, capsys):
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
        execute_notebooks({find_notebooks()[0]: {"clips": 1}}, two / "out", 2, done.__setitem__)
