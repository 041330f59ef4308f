import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from refined_ldm.cli.commands import main
from refined_ldm.experiment.ledger import compute, read_ledger, verify
from tests.support.runs import TABLE

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "figures" / "claims.yaml"


def claim(**changes):
    return {"id": "nearer", "words": "better audio", "status": "reproduced", "found": "C is at 85.0, B at 110.0",
            "command": "refined-ldm experiment", "table": "runs.csv"} | changes  # fmt: skip


def ledger(folder, *claims):
    TABLE.to_csv(folder / "runs.csv", index=False)
    path = folder / "figures" / "claims.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(list(claims)))
    return path


@pytest.mark.parametrize(("how", "value"), [
    ({"take": "mean", "where": {"label": "C"}}, 85),
    ({"take": "ratio", "where": {"label": "B"}, "than": {"label": "C"}}, 110 / 85),
    ({"take": "least", "where": {}}, 80), ({"take": "most"}, 120), ({"take": "count", "where": {"seed": [0, 1]}}, 4),
    ({"take": "difference", "where": {"label": "C"}, "than": {"label": "B"}}, -25),
    ({"take": "difference low", "where": {"label": "C"}, "than": {"label": "B"}}, -25 - 4.302653 * 5 / 3**0.5),
])  # fmt: skip
def test_compute(how, value):
    assert compute(how | {"column": "frechet"}, TABLE) == pytest.approx(value)


def test_compute_refuses_unknown_operations():
    for how, fault in (({"take": "median", "column": "frechet"}, "take must be"),
                       ({"take": "mean", "column": "x"}, "'x'"),
                       ({"take": "mean", "column": "frechet", "where": {"label": "Z"}}, "no row"),
                       ({"take": "mean", "column": "frechet", "where": {"arm": "Z"}}, "no column 'arm'")):  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            compute(how, TABLE)


@pytest.mark.parametrize("content, message", [
    (b"file,caption\nrain.wav,rain", "no ledger"), (b"id: nearer", "no ledger"), (b"- nearer", "no ledger"),
    (b"", "no ledger"), (b"- {id: [", "not plain YAML"), (b"- id: caf\xe9", "not plain YAML"),
])  # fmt: skip
def test_another_file_in_place_of_the_ledger_is_reported_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "other").write_bytes(content)
    assert main(["verify", "--ledger", str(tmp_path / "other")]) == 2
    printed, errors = capsys.readouterr()
    assert not printed and len(errors.splitlines()) == 1 and f"{tmp_path / 'other'} is {message}" in errors


NUMBER = {"value": "85.0", "take": "mean", "column": "frechet", "where": {"label": "C"}}


def test_a_true_number_passes_and_any_changed_digit_fails(tmp_path):
    assert [c.fault for c in verify(ledger(tmp_path, claim(numbers=[NUMBER])))] == [""]
    for wrong in ("86.0", "85.1", "75.0", "85.00001"):
        found = claim(found=f"C is at {wrong}", numbers=[NUMBER | {"value": wrong}])
        assert "comes out as 85.0" in verify(ledger(tmp_path, found))[0].fault, wrong


def test_numbers_of_runs_are_computed_from_the_files_of_the_runs(tmp_path):
    source = ROOT / "figures" / "data" / "experiment"
    for path in source.glob("D-150-*"):
        shutil.copy(path, tmp_path)
    number = {"value": "0.0139", "take": "mean", "column": "error_250", "where": {"label": "D"}}
    path = ledger(tmp_path, claim(found="at 0.0139", table=".", numbers=[number]))
    assert verify(path)[0].fault == ""
    errors = pd.read_csv(tmp_path / "D-150-1.csv")
    errors["error"] *= 1.1  # in one seed of three
    errors.to_csv(tmp_path / "D-150-1.csv", index=False)
    assert "comes out as 0.014" in verify(path)[0].fault


def test_a_number_must_stand_in_the_sentence_in_its_interval_and_where_it_is_stated(tmp_path):
    assert "is not in what" in verify(ledger(tmp_path, claim(found="C is nearer", numbers=[NUMBER])))[0].fault
    assert "must lie within" in verify(ledger(tmp_path, claim(numbers=[NUMBER | {"within": [0, 80]}])))[0].fault
    (tmp_path / "README.md").write_text("C is at 84.9")
    path = ledger(tmp_path, claim(numbers=[NUMBER], stated_in=["README.md"]))
    assert "is not in README.md" in verify(path)[0].fault


def test_a_ledger_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"claims\.yaml"):
        read_ledger(tmp_path / "claims.yaml")
    for wrong, fault in ((claim(status="true"), "status of nearer"), ({"id": "nearer"}, "lacks words")):
        with pytest.raises(ValueError, match=fault):
            read_ledger(ledger(tmp_path, wrong))
    with pytest.raises(ValueError, match="two claims nearer"):
        read_ledger(ledger(tmp_path, claim(), claim()))
    with pytest.raises(FileNotFoundError, match="gone.csv: refined-ldm experiment makes it"):
        verify(ledger(tmp_path, claim(table="gone.csv", numbers=[NUMBER])))


def test_the_ledger_of_this_repository_holds():
    checked = verify(LEDGER)
    assert [f"{c.claim}: {c.written} {c.fault}" for c in checked if c.fault] == []
    assert len(checked) >= 20


def test_every_claim_of_the_seed_is_in_the_ledger_in_its_own_words():
    words = " ".join(claim["words"] for claim in read_ledger(LEDGER))
    for said in ("lower loss in fewer iterations (50k vs. 500k)", "Better semantic representations",
                 "higher quality audio synthesis", "improve scene classification",
                 "lower GPU consumption"):  # fmt: skip
        assert said in words


def test_a_changed_digit_of_any_claim_makes_the_command_fail(tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    shutil.copytree(ROOT / "figures" / "data", tmp_path / "figures" / "data")
    for name in ("docs", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    copy = tmp_path / "figures" / "claims.yaml"
    original = LEDGER.read_text()
    copy.write_text(original)
    assert main(["verify", "--ledger", str(copy)]) == 0
    last_digits = [m.end(1) - 1 for m in re.finditer(r'value: "?(-?[\d.]+)', original)]
    changed, digits = last_digits[:: max(1, len(last_digits) // 12)], list(original)
    for at in changed:
        digits[at] = str((int(original[at]) + 1) % 10)
    copy.write_text("".join(digits))
    capsys.readouterr()
    assert main(["verify", "--ledger", str(copy)]) == 2
    assert capsys.readouterr().err.count("comes out as") == len(changed) >= 12  # each is named
