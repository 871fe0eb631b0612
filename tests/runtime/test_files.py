"""Lists of names."""
import unicodedata

import pytest

from utils.runtime.errors import UserError
from utils.runtime.files import read_names

KNOWN = ["Aaron_Eckhart", "José Núñez", "Zoë", "Ann"]


def read(tmp_path, data: bytes, known=KNOWN) -> set[str]:
    (tmp_path / "names.txt").write_bytes(data)
    return read_names(tmp_path / "names.txt", "fr.leave_out", known)


def refused(tmp_path, data: bytes, words: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, data)
    assert str(error.value) == f"{tmp_path / 'names.txt'}{words}" and "\n" not in words


@pytest.mark.parametrize("data", [
    "Zoë\nAnn\n".encode(), "Zoë\r\nAnn".encode(), "  Zoë \n\n\tAnn\n\n".encode(), "Zoë\nAnn\nZoë\n".encode(),
    b"\xef\xbb\xbf" + "Zoë\nAnn\n".encode()], ids=["plain", "Windows", "spaces", "twice", "byte order mark"])
def test_names_are_read_one_a_line(tmp_path, data):
    assert read(tmp_path, data) == {"Zoë", "Ann"}


def test_an_empty_list_names_nobody(tmp_path):
    assert read(tmp_path, b"") == read(tmp_path, b"\n \n") == set()


@pytest.mark.parametrize("of_list, of_folder", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_are_the_same_in_either_unicode_form(tmp_path, of_list, of_folder):
    folder = unicodedata.normalize(of_folder, "José Núñez")
    found = read(tmp_path, unicodedata.normalize(of_list, "José Núñez\n").encode(), [folder, "Ann"])
    assert found == {folder}  # as the folder writes it


@pytest.mark.parametrize("encoding, words", [
    ("utf-16", ": is not UTF-8 (invalid start byte at byte 0); save the list as UTF-8"),
    ("latin-1", ": is not UTF-8 (invalid continuation byte at byte 7); save the list as UTF-8")])
def test_another_encoding_is_refused_in_one_line(tmp_path, encoding, words):
    refused(tmp_path, "Ann\nJosé Núñez\n".encode(encoding), words)


@pytest.mark.parametrize("text, words", [
    ("Ann\n\nAaron_Ekhart\nnobody", ":3: 'Aaron_Ekhart' is not there to be chosen (fr.leave_out); "
     "did you mean 'Aaron_Eckhart'?"),
    ("Ann\nxyzzy\n", ":2: 'xyzzy' is not there to be chosen (fr.leave_out); correct or remove that line")])
def test_an_unknown_name_is_named_with_its_line(tmp_path, text, words):
    refused(tmp_path, text.encode(), words)


def test_a_list_that_is_not_there_is_named_with_its_setting(tmp_path):
    with pytest.raises(UserError, match=r"absent.txt: no such file \(fr.leave_out\); "):
        read_names(tmp_path / "absent.txt", "fr.leave_out", KNOWN)
