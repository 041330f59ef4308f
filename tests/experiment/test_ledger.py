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
CARDS = {"conditioner": ["laion"] * 3 + ["ms"] * 3, "conditioner_weights": ["laion, 1"] * 3 + ["ms, 1"] * 3,
         "precision": "float32", "machine": "a CPU", "lr_schedule": "cosine", "iterations": 9}  # fmt: skip
EVIDENCE = {"what": "distance of C", "is": "85.0 (80.0 to 90.0)", "column": "frechet", "of": {"label": "C"}}
DIFFERENCE = EVIDENCE | {"is": "-25.0 (-37.4 to -12.6)", "minus": {"label": "B"}}


def claim(**changes):
    return {"id": "nearer", "words": "better audio", "verdict": "reproduced", "found": "C is nearer"} | changes


def ledger(folder, *claims, **cards):
    TABLE.assign(**CARDS | cards).to_csv(folder / "runs.csv", index=False)
    path = folder / "figures" / "claims.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(list(claims)))
    return path


def with_evidence(evidence):
    return claim(evidence=[evidence | {"table": "runs.csv"}])


def test_evidence_is_a_mean_with_its_range_or_a_difference_with_its_interval():
    table = TABLE.assign(**CARDS)
    assert compute(EVIDENCE, table) == "85.0 (80.0 to 90.0)"
    assert compute(EVIDENCE | {"of": {"label": "C", "seed": 1}}, table) == "85.0"
    assert compute(EVIDENCE | {"is": "85.00"}, table) == "85.00 (80.00 to 90.00)"
    half = 4.302653 * 5 / 3**0.5  # Student's t of a table
    assert compute(DIFFERENCE, table) == f"-25.0 ({-25 - half:+.1f} to {-25 + half:+.1f})"
    shares = pd.DataFrame({"probe": ["order"], "value": [0.5], "low": [0.43], "high": [0.57]})
    assert compute({"is": "0.00", "column": "value", "of": {"probe": "order"}}, shares) == "0.50 (0.43 to 0.57)"


def test_evidence_without_rows_or_column_is_refused():
    for change, fault in (({"column": "x"}, "no column 'x'"), ({"of": {"label": "Z"}}, "no row"),
                          ({"of": {"arm": "Z"}}, "no column 'arm'")):  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            compute(EVIDENCE | change, TABLE.assign(**CARDS))


def test_only_runs_with_equal_cards_are_subtracted(tmp_path):
    two = ["float32"] * 3 + ["bfloat16"] * 3
    with pytest.raises(ValueError, match="nearer, distance of C: .* differ in precision: bfloat16 and float32 in runs"):
        verify(ledger(tmp_path, with_evidence(DIFFERENCE), precision=two))
    named = with_evidence(DIFFERENCE | {"differ": ["precision"]})
    assert [c.fault for c in verify(ledger(tmp_path, named, precision=two))] == [""]
    with pytest.raises(ValueError, match="no seeds of one run, they differ in iterations: 8 and 9"):
        verify(ledger(tmp_path, with_evidence(EVIDENCE), iterations=[9, 9, 9, 9, 9, 8]))
    weights = ["laion, 1", "laion, 2", "laion, 1", "ms, 1", "ms, 1", "ms, 1"]
    with pytest.raises(ValueError, match="conditioner_weights: laion, 1 and laion, 2"):
        verify(ledger(tmp_path, with_evidence(DIFFERENCE), conditioner_weights=weights))


@pytest.mark.parametrize("content, message", [
    (b"file,caption\nrain.wav,rain", "no ledger"), (b"id: nearer", "no ledger"), (b"- nearer", "no ledger"),
    (b"", "no ledger"), (b"- {id: [", "not plain YAML"), (b"- id: caf\xe9", "not plain YAML"),
])  # fmt: skip
def test_another_file_in_place_of_the_ledger_is_reported_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "other").write_bytes(content)
    assert main(["verify", "--ledger", str(tmp_path / "other")]) == 2
    printed, errors = capsys.readouterr()
    assert not printed and len(errors.splitlines()) == 1 and f"{tmp_path / 'other'} is {message}" in errors


@pytest.mark.parametrize("evidence", [EVIDENCE, DIFFERENCE], ids=["mean", "difference"])
def test_a_true_value_passes_and_any_changed_digit_fails(tmp_path, evidence):
    assert [c.fault for c in verify(ledger(tmp_path, with_evidence(evidence)))] == [""]
    for at in re.finditer(r"\d", evidence["is"]):
        wrong = evidence["is"][: at.start()] + str((int(at[0]) + 1) % 10) + evidence["is"][at.end() :]
        checked = verify(ledger(tmp_path, with_evidence(evidence | {"is": wrong})))
        assert checked[0].fault == f"comes out as {evidence['is']}", wrong


def test_evidence_is_computed_from_the_files_of_the_runs(tmp_path):
    for path in (ROOT / "figures" / "data" / "experiment").glob("D-150-*"):
        shutil.copy(path, tmp_path)
    evidence = {"what": "noise error", "is": "0.0139 (0.0139 to 0.0140)", "column": "error_250", "of": {"label": "D"}}
    path = ledger(tmp_path, claim(evidence=[evidence | {"table": "."}]))
    assert verify(path)[0].fault == ""
    errors = pd.read_csv(tmp_path / "D-150-1.csv")
    errors["error"] *= 1.1  # in one seed of three
    errors.to_csv(tmp_path / "D-150-1.csv", index=False)
    assert "comes out as 0.014" in verify(path)[0].fault


def test_a_ledger_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"claims\.yaml"):
        read_ledger(tmp_path / "claims.yaml")
    for wrong, fault in ((claim(verdict="true"), "verdict of nearer"), ({"id": "nearer"}, "lacks words"),
                         (claim(verdict="not run yet"), "nearer is a hypothesis, it must say what would refute it"),
                         (claim(evidence=[{"is": "1"}]), "evidence of nearer lacks what, column, of")):  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            read_ledger(ledger(tmp_path, wrong))
    with pytest.raises(ValueError, match="two claims nearer"):
        read_ledger(ledger(tmp_path, claim(), claim()))
    with pytest.raises(FileNotFoundError, match="gone.csv: `refined-ldm experiment` makes it"):
        verify(ledger(tmp_path, claim(evidence=[EVIDENCE | {"table": "gone.csv"}])))


def test_every_claim_of_the_seed_is_in_the_ledger_in_its_own_words():
    words = " ".join(claim["words"] + claim.get("also", "") for claim in read_ledger(LEDGER))
    for said in ("lower loss in fewer iterations (50k vs. 500k)", "required 500k iterations without achieving similar",
                 "Better semantic representations", "higher quality audio synthesis", "improve scene classification",
                 "lower GPU consumption", "a more robust text encoding mechanism"):  # fmt: skip
        assert said in words


def test_a_changed_digit_of_any_claim_or_document_makes_the_command_fail(tmp_path, capsys):
    for name in ("figures/data", "docs", "refined_ldm/weights/tiny/card.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    copy, original = tmp_path / "figures" / "claims.yaml", LEDGER.read_text()
    copy.write_text(original)
    assert main(["verify", "--ledger", str(copy)]) == 0
    values = [at.start(1) + at[1].find(".") + 1 for at in re.finditer(r"is: '([^']+)'", original)]
    digits = list(original)
    for at in values:
        digits[at] = str((int(original[at]) + 1) % 10)
    copy.write_text("".join(digits))
    capsys.readouterr()
    assert main(["verify", "--ledger", str(copy)]) == 2
    assert capsys.readouterr().err.count("comes out as") == len(values) >= 20  # each is named


def test_a_changed_digit_in_a_document_is_a_fault(tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("images", "api", "*.mp3"))
    (root / "refined_ldm" / "weights" / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "refined_ldm" / "weights" / "tiny" / "card.json", root / "refined_ldm" / "weights" / "tiny")
    shutil.copytree(ROOT / "figures" / "data", root / "figures" / "data")
    for name in ("README.md", "figures/claims.yaml"):
        shutil.copy(ROOT / name, root / name)
    page = root / "docs" / "experiment.md"
    page.write_text(page.read_text().replace("281.1", "281.2"))
    faults = [c for c in verify(root / "figures" / "claims.yaml") if c.fault]
    assert faults and {c.claim for c in faults} == {"docs/experiment.md"} and "281.2" in faults[0].written
