"""experiments/documents.py: what stands between an experiment's comments is replaced, all else stays."""
import pytest

from experiments import documents
from utils.runtime.errors import UserError


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    return tmp_path / "a.md"


def test_only_what_stands_between_the_markers_is_replaced(file):
    below, above = documents.markers("one")
    others = "\n".join(documents.markers("other"))
    file.write_text(f"# Title\n{below}\nold\n{above}\nend {others}\n")
    documents.write_between("a.md", "one", "| a |\n")
    assert file.read_text() == f"# Title\n{below}\n| a |\n{above}\nend {others}\n"


@pytest.mark.parametrize("kept", [(), (0,), (1,), (1, 0)])
def test_a_document_without_both_markers_is_left_as_it_is(file, kept):
    text = "\n".join(documents.markers("one")[number] for number in kept)
    file.write_text(text)
    with pytest.raises(UserError, match=r"a\.md: lacks one of the comments .* restore <!-- below: written by .*experiments.one"):
        documents.write_between("a.md", "one", "new")
    assert file.read_text() == text


def test_a_missing_document_is_one_line(file):
    with pytest.raises(UserError, match="lacks one of the comments"):
        documents.write_between("a.md", "one", "new")
