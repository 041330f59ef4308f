"""The documents: short, their links alive, their tables and sounds those of the stored measurements and weights."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from refined_ldm import RefinedAudioLDM
from tests.support.scripts import ROOT, load_script

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
tables, listen, badges = (load_script(f"{path}.py") for path in ("docs/tables", "docs/listen", "notebooks/badges"))


def prose(path: Path) -> str:
    """The text of a page without code blocks and comments."""
    return re.sub(r"```.*?```|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown page's headings have."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page):
    dead = []
    for link in (first or second for first, second in LINK.findall(prose(page))):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", tables.DOCUMENTS, ids=lambda page: page.name)
def test_tables_are_those_of_the_stored_measurements(page):
    text = page.read_text(encoding="utf-8")
    assert tables.render(text) == text, "run `make tables`"


def test_a_changed_digit_in_a_table_is_noticed():
    text = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    decimals = [(place, re.search(r"\.\d", place[0])) for place in tables.PLACE.finditer(text)]
    places = [place.start() + found.start() + 1 for place, found in decimals if found]
    assert len(places) >= 5
    for at in places:
        wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert tables.render(wrong) == text


def test_every_table_is_used_and_an_unknown_one_is_refused():
    text = "".join(page.read_text(encoding="utf-8") for page in tables.DOCUMENTS)
    assert {place[1] for place in tables.PLACE.finditer(text)} == set(tables.WRITERS)
    with pytest.raises(ValueError, match="no table 'prices'"):
        tables.render("<!-- prices --><!-- /prices -->")


def test_sounds_and_animation_are_small_and_of_the_shipped_weights():
    rows = tables._sounds()
    assert [row["name"] for row in rows] == [sound.name for sound in listen.SOUNDS] and len(rows) == 6
    assert {row["weights"] for row in rows} == {listen.shipped_digest()}, "run `make listen`, and listen"
    assert [(row["caption"], row["verdict"], row["reason"]) for row in rows] == [
        (sound.caption, sound.verdict, sound.reason) for sound in listen.SOUNDS
    ]
    for row in rows:
        assert 1000 < (ROOT / "docs" / "sounds" / f"{row['name']}.mp3").stat().st_size <= listen.SOUND_LIMIT
        assert row["verdict"] in ("right", "partly", "wrong")
    assert (ROOT / "docs" / "images" / "denoising.gif").stat().st_size <= listen.ANIMATION_LIMIT


def test_the_animation_ends_at_the_sound_that_is_generated():
    model, sound = RefinedAudioLDM.from_preset("tiny"), listen.ANIMATED
    latents, mels = listen.denoising(model, sound, steps=2)
    assert len(latents) == len(mels) == 3
    expected = model.generate([sound.caption], seed=sound.seed, steps=2, sampler="dpmpp", candidates=1)
    mel = model.decode(latents[-1:])
    torch.testing.assert_close(mels[-1:], mel, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.to_waveform(mel)[:, : expected.shape[1]], expected, rtol=0, atol=1e-4)


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = set(re.findall(r"tests/\w+/\w+\.py", text))
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
    headers = ("| ---", "| promise", "| input")
    promises = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(headers)]
    assert [line for line in promises if not re.search(r"`tests/|`make |the same test", line)] == []


def test_the_site_shows_every_page_and_notebook():
    settings = re.sub(r"!!\S+", "", (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))
    shown = set(re.findall(r"\S+\.(?:md|ipynb)", str(yaml.safe_load(settings)["nav"]).replace("'", " ")))
    pages = {path.relative_to(ROOT).as_posix() for path in [*PAGES, *(ROOT / "notebooks").glob("*.ipynb")]}
    assert shown == pages


def test_the_readme_has_badges_once_there_is_an_address():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with_badges = badges.point_readme(text, "someone/else.where")
    notebooks = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert {f"github/someone/else.where/blob/main/notebooks/{name})" for name in notebooks} == set(
        re.findall(r"github/someone\S+?\)", with_badges)
    )
    assert badges.point_readme(with_badges, "a/b") == badges.point_readme(text, "a/b")
    assert badges.point_readme(with_badges, badges.UNSET) == badges.point_readme(text, badges.UNSET)
