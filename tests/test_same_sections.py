"""The copied sections are equal, and the check that says so can fail."""

import shutil

import pytest
import same_sections
from conftest import ROOT


def test_copied_sections_are_the_same():
    assert not same_sections.problems()


@pytest.fixture
def copies(tmp_path, monkeypatch):
    for name in same_sections.existing():
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    monkeypatch.setattr(same_sections, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", [
    "    return base_lr * (1 - step / total_steps) ** power",  # a top-level section
    "            image_l, label_l = next(batches_l)",  # sections inside main, at each depth
    "        scaler.update()",
    "    checkpoint = run.open()",
    "    if checkpoint[\"unscored\"]:  # the run was stopped in its last evaluation: this is it",
])  # fmt: skip
def test_a_changed_copy_is_found_and_repaired(line, copies):
    path = copies / "cps.py"
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + "  # changed"))
    assert any("differs" in problem for problem in same_sections.problems())
    same_sections.write("supervised")
    assert path.read_text() == text and not same_sections.problems()


def test_a_twin_name_with_other_text_is_found(copies):
    path = copies / "supervised.py"
    path.write_text(path.read_text() + "\n\ndef paste():\n    pass\n")
    assert "paste has different text in supervised.py and cps.py" in same_sections.problems()


def test_sections_out_of_order_are_found(copies):
    path = copies / "cps.py"
    text = path.read_text().replace("# === losses (copied) ===", "# === swap ===")
    text = text.replace("# === model (copied) ===", "# === losses (copied) ===")
    path.write_text(text.replace("# === swap ===", "# === model (copied) ==="))
    assert any("order" in problem for problem in same_sections.problems())
