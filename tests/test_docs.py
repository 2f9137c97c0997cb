"""What the documents say exists."""

import re
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPTS

import predict

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_FLAGS = {
    "--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--logdir",
    "--help", "--rows", "--workers", "--threads", "--paper", "--out",
    "--from", "--write", "--report", "--readme", "--check", "--no-cutmix",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_links(page):
    text = page.read_text()
    known = {
        f"--{no}{field.name.replace('_', '-')}"
        for script in (*SCRIPTS.values(), predict)
        for field in fields(script.Args)
        for no in ("", "no-")
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) <= known | OTHER_FLAGS
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_every_logged_key_is_documented(script):
    keys = set(
        re.findall(r'"((?:loss|pseudo|val|time)/[a-z_]+)', (ROOT / f"{script}.py").read_text())
    )
    pages = "".join((ROOT / f"docs/{name}.md").read_text() for name in {"supervised", script})
    assert keys and all(f"`{key}" in pages for key in keys), keys


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_every_method_flag_is_documented(script):
    module = SCRIPTS[script]
    page = (ROOT / f"docs/{script}.md").read_text()
    common = {field.name for field in fields(SCRIPTS["supervised"].Args)}
    own = {field.name for field in fields(module.Args)} - common
    for flag in (name.replace("_", "-") for name in own):
        assert f"--{flag}" in page or f"--no-{flag}" in page, flag


def test_readme_is_short_and_its_test_command_is_the_one_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    command = re.search(r"<!-- test -->\n```bash\n(.*?)\n```", text, re.DOTALL)
    assert "pytest" in command[1] and "requirements.txt" in command[1]


def test_every_marked_difference_is_numbered_on_its_page():
    marks = [
        mark
        for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]
        for mark in re.findall(r"# DIFFERS \((\w+\.md) (\d+)\)", path.read_text())
    ]
    assert len(marks) > 8
    for page, number in marks:
        assert re.search(rf"^{number}\. ", (ROOT / "docs" / page).read_text(), re.M), (page, number)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
        assert not re.search(r"DIFFERS(?! \(\w+\.md \d+\):)", path.read_text()), path


def test_reading_order_is_that_of_the_scripts():
    import same_sections

    table = same_sections.reading_order()
    assert table in (ROOT / "README.md").read_text(), "python tests/same_sections.py --readme"
