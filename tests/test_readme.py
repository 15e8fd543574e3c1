"""The README's results come from files: sections equal what their files say, and an unsourced number is found."""

import json
from pathlib import Path

import pytest

from benches.scripts import gpu_section, readme, sections

ROOT = Path(__file__).parent.parent

MARKED = "before 3.14\n\n<!-- results:compare some -->\n{}<!-- /results -->\n\nafter 42\n"
RUN = {
    "n": 500, "device": "cpu x2", "precision": "bfloat16", "versions": {"torch": "2.11.0"}, "data": "some images",
    "floor": {"fd": 0.5, "scores": {"FD-A": 0.5, "FD-B": 10.04}},
    "teacher": {"fd": 2.0, "nfe": 15, "scores": {"FD-A": 2.0, "FD-B": 20.26}, "seconds": 61.6, "images": 12345, "images_per_second": 200.4, "peak_memory_gib": 0.75},
    "methods": {"sim": {"fd": 3.0, "nfe": 1, "scores": {"FD-A": 3.0, "FD-B": 31.0}, "seconds": 30.2, "images": 640, "images_per_second": 21.2, "peak_memory_gib": None}},
}  # fmt: skip


@pytest.fixture
def places(tmp_path):
    """A README with one empty section, and the folder of its results."""
    (tmp_path / "results/some").mkdir(parents=True)
    (tmp_path / "results/some/compare.json").write_text(json.dumps(RUN))
    (tmp_path / "README.md").write_text(MARKED.format(""))
    return [f"--readme={tmp_path}/README.md", f"--results={tmp_path}/results"], tmp_path


def test_our_readme_holds_no_other_numbers_than_its_files(capsys):
    assert "<!-- results:" in (ROOT / "README.md").read_text()
    readme.main(["--check"])


def test_a_section_is_rewritten_from_its_file_and_the_rest_is_left_alone(places):
    arguments, folder = places
    readme.main(arguments)
    text = (folder / "README.md").read_text()
    assert text.startswith("before 3.14\n\n<!-- results:compare some -->\n")
    assert text.endswith("<!-- /results -->\n\nafter 42\n")
    assert "| teacher | 15 | 2.00 | 20.3 | 62 | 12,345 | 200 | 0.75 |" in text.splitlines()
    assert "| SIM | 1 | 3.00 | 31.0 | 30 | 640 | 21 |  |" in text.splitlines()
    readme.main([*arguments, "--check"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("| 2.00 |", "| 1.90 |"), "is not what its file says"),
        (("<!-- /results -->", ""), "no <!-- /results -->"),
        (("results:compare some", "results:compare other"), "has no source"),
        (("results:compare some", "results:guess some"), "wanted one of gpu, captions, guided, demo, compare"),
    ],
)
def test_what_is_wrong_is_told(places, change, words):
    arguments, folder = places
    readme.main(arguments)
    path = folder / "README.md"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(SystemExit, match=words):
        readme.main([*arguments, "--check"])


def test_a_number_that_no_file_holds_is_refused_also_where_the_script_made_it(places, monkeypatch):
    arguments, folder = places
    made = sections.compare
    monkeypatch.setitem(sections.KINDS, "compare", ("compare.json", lambda run: made(run) + "This is 1.7 times faster.\n"))
    with pytest.raises(SystemExit, match=r"1\.7 is in no source file"):
        readme.main(arguments)
    assert (folder / "README.md").read_text() == MARKED.format("")


@pytest.mark.parametrize(
    ("token", "value", "shown"),
    [("0.75", 749089 / 1, True), ("1,797", 1797, True), ("12.3", 12.349, True), ("12.4", 12.349, False), ("0.00", 5e-5, True), ("0.00", 4e-2, False), ("0", 0, True), ("-0.5", 0.5, False)],
)  # fmt: skip
def test_what_counts_as_the_same_number(token, value, shown):
    assert readme.shows(token, value) is shown


def test_time_to_quality_says_plainly_what_was_not_reached():
    rows = [
        {"switch": "as is", "method": "sim", "seconds": 12.2, "best": 2.4, "trained": 30.0},
        {"switch": "as is", "method": "dmd", "seconds": None, "best": 2.6, "trained": 30.1},
        {"switch": "graphs", "method": "sim", "unavailable": "no such setting"},
    ]
    told = {"title": "FD-A", "factor": 1.25, "teacher": 2.0, "bar": 2.5, "floor": 0.5, "n": 500, "device": "cpu x2", "rows": rows}
    lines = sections.time_to_quality(told).splitlines()
    assert "| as is | 12 | not reached (2.60 after 30 s) |" in lines
    assert "| graphs | not in this version |  |" in lines
    assert readme.unsourced("\n".join(lines), [told]) == []


def test_without_a_gpu_result_it_is_said(tmp_path):
    assert gpu_section.section(tmp_path) == (gpu_section.NO_GPU, [])
    for name in ("nvidia-h200-2026-01-02", "nvidia-a100-2026-01-03", "cpu-fast32"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps(RUN | {"device": name}))
    assert "nvidia-a100" in gpu_section.section(tmp_path)[0]
