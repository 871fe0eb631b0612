"""Is this already made? What a record answers, and what it leaves behind when it is killed."""
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from utils.runtime import records
from utils.runtime.errors import UserError
from utils.runtime.files import HOST
from utils.runtime.records import Record, State, check_sources, decided

DECIDES = {"contexts.number": 100, "contexts.seed": 0, "contexts.source": "uniform", "statistics": "ab12",
           "guidance.interval": (0, 999)}  # a tuple, which comes back from JSON as a list


def of_file(folder: Path, **changes) -> Record:
    """The record of a file that contexts.name names."""
    return Record(folder / "c.json", DECIDES | changes, "contexts.name", target=folder / "c.npz")


def of_folder(folder: Path, may_change: dict | None = None, **changes) -> Record:
    """The record of a folder that paths.run names."""
    return Record(folder / "run" / "run.json", DECIDES | changes, "paths.run", may_change=may_change or {})


def of_cache(folder: Path, **changes) -> Record:
    """The record of a cached file."""
    return Record(folder / "c.json", DECIDES | changes, target=folder / "c.npz")


def written(record: Record) -> dict:
    return json.loads(record.file.read_text())


def refused(record: Record, *words: str) -> None:
    """state() and begin() refuse alike, in one line, and leave everything as it is."""
    before = {file: file.read_bytes() for file in record.file.parent.rglob("*") if file.is_file()}
    messages = []
    for action in (record.state, record.begin):
        with pytest.raises(UserError) as error:
            action()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    for word in words:
        assert word in messages[0], messages[0]
    assert {file: file.read_bytes() for file in record.file.parent.rglob("*") if file.is_file()} == before


# ---- made, begun, done -----------------------------------------------------------------------------------------------

def test_a_new_file_is_made_and_done_when_it_is_there(tmp_path):
    record = of_file(tmp_path)
    assert record.state() is State.MAKE and not record.file.exists()
    assert record.begin(config={"device": "cpu"}, digest="cd34") is State.MAKE
    saved = written(record)
    assert saved["format"] == 2 and saved["may_change"] == {} and saved["digest"] == "cd34"
    assert saved["config"] == {"device": "cpu"}
    assert saved["decides"] == DECIDES | {"guidance.interval": [0, 999]}
    assert saved["versions"]["python"] == platform.python_version() and "torch" in saved["versions"]

    assert of_file(tmp_path).begin() is State.MAKE  # killed between record and target
    record.target.write_bytes(b"contexts")
    before = record.file.read_bytes()
    assert of_file(tmp_path).state() is State.DONE and of_file(tmp_path).begin(config={}) is State.DONE
    assert record.file.read_bytes() == before and record.target.read_bytes() == b"contexts"


def test_a_new_folder_is_made_and_then_continued(tmp_path):
    assert of_folder(tmp_path).state() is State.MAKE
    assert of_folder(tmp_path).begin(config={"device": "cpu"}) is State.MAKE
    before = of_folder(tmp_path).file.read_bytes()
    assert of_folder(tmp_path).state() is State.CONTINUE and of_folder(tmp_path).begin(config={}) is State.CONTINUE
    assert of_folder(tmp_path).file.read_bytes() == before


@pytest.mark.parametrize("changes, words", [
    ({"contexts.seed": 5}, "was made with contexts.seed = 0, now it is 5;"),
    ({"contexts.source": "gaussian"}, "was made with contexts.source = 'uniform', now it is 'gaussian';"),
    ({"statistics": None}, "was made with statistics = 'ab12', now it is None;"),
    ({"guidance.interval": (0, 500)}, "was made with guidance.interval = [0, 999], now it is [0, 500];"),
    ({"contexts.per": "image"}, "was made with contexts.per = None, now it is 'image';"),  # was not recorded
    ({"contexts.seed": 5, "contexts.number": 7}, "was made with contexts.number = 100, now it is 7;"),  # the first one
])
def test_another_setting_is_named_with_both_values_and_what_to_change(tmp_path, changes, words):
    of_file(tmp_path).begin()
    of_file(tmp_path).target.write_bytes(b"contexts")
    refused(of_file(tmp_path, **changes), f"{tmp_path / 'c.npz'}: {words}", "; set contexts.name to another name, or delete "
            "that file")
    of_folder(tmp_path).begin()
    refused(of_folder(tmp_path, **changes), f"{tmp_path / 'run'}: {words}", "; set paths.run to another name, or delete that "
            "folder")


def test_a_setting_that_is_no_longer_given_differs(tmp_path):
    of_folder(tmp_path, **{"contexts.per": "image"}).begin()
    refused(of_folder(tmp_path), "was made with contexts.per = 'image', now it is None;")


def test_a_file_without_a_record_is_not_taken_for_ours(tmp_path):
    of_file(tmp_path).target.write_bytes(b"of somebody else")
    refused(of_file(tmp_path), "c.npz: has no record of how it was made (c.json is gone); set contexts.name to another name")


# ---- caches ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kept", ['"ab12"', "[]", "null", '{"decides": 3}', None],
                         ids=["earlier version", "list", "null", "no settings", "no record"])
def test_a_cache_with_another_record_is_made_again(tmp_path, kept):
    record = of_cache(tmp_path)
    record.target.write_bytes(b"stale")
    if kept is not None:
        record.file.write_text(kept)
    assert record.state() is State.MAKE and record.target.exists()  # asking changes nothing
    assert record.begin() is State.MAKE and not record.target.exists()
    record.target.write_bytes(b"new")
    assert of_cache(tmp_path).begin() is State.DONE and record.target.read_bytes() == b"new"


def test_a_stale_cache_is_removed_before_the_record_says_otherwise(tmp_path, monkeypatch):
    of_cache(tmp_path).begin()
    of_cache(tmp_path).target.write_bytes(b"stale")
    assert of_cache(tmp_path).state() is State.DONE
    changed = of_cache(tmp_path, **{"contexts.seed": 5})
    assert changed.state() is State.MAKE

    def killed(file, value):
        assert file == changed.file and value["decides"]["contexts.seed"] == 5 and not changed.target.exists()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            changed.begin()
    # the record is still of the earlier settings, but nothing is there to be taken for done by either of them
    assert of_cache(tmp_path).state() is State.MAKE and changed.state() is State.MAKE
    assert changed.begin() is State.MAKE and written(changed)["decides"]["contexts.seed"] == 5
    assert changed.state() is State.MAKE  # killed between record and target
    changed.target.write_bytes(b"new")
    assert changed.state() is State.DONE and of_cache(tmp_path).state() is State.MAKE


def test_a_cached_folder_goes_on_or_is_made_again(tmp_path):
    def landmarks(digest: str) -> Record:
        return Record(tmp_path / "landmarks.json", {"images": digest})

    assert landmarks("a").begin() is State.MAKE
    assert landmarks("a").begin() is State.CONTINUE
    assert landmarks("b").state() is State.MAKE
    assert landmarks("b").begin() is State.MAKE and landmarks("b").state() is State.CONTINUE


# ---- what was made, and by whom --------------------------------------------------------------------------------------

def make(record: Record, content: bytes, beside: bytes = b"index", seconds: float = 0.0) -> bool:
    index = record.target.with_suffix(".index")
    with record.making(index) as is_new:
        if is_new:
            time.sleep(seconds)
            record.target.write_bytes(content)
            index.write_bytes(beside)
    return is_new


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "c.npz").write_bytes(b"other"), lambda folder: (folder / "c.index").write_bytes(b"other"),
    lambda folder: (folder / "c.index").unlink(), lambda folder: (folder / "c.npz").unlink()],
    ids=["another target", "another file beside it", "no file beside it", "no target"])
def test_a_cache_whose_content_is_another_is_made_again(tmp_path, damage):
    assert make(of_cache(tmp_path), b"first") and not make(of_cache(tmp_path), b"second")
    before = (tmp_path / "c.npz").stat()
    damage(tmp_path)
    if (tmp_path / "c.npz").exists():
        os.utime(tmp_path / "c.npz", ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time do not tell
    assert of_cache(tmp_path).state() is State.MAKE
    assert make(of_cache(tmp_path), b"again") and (tmp_path / "c.npz").read_bytes() == b"again"


def test_a_copy_of_a_cache_is_done_whatever_its_inodes_and_times(tmp_path):
    make(of_cache(tmp_path / "a"), b"first")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert of_cache(tmp_path / "b").state() is State.DONE


@pytest.mark.parametrize("made", ['"x"', "[]", '{"c.npz": 3}', '{"c.npz": []}', '{"c.npz": [null]}', '{"../c.npz": [1]}'])
def test_a_damaged_note_of_what_was_made_makes_it_again(tmp_path, made):
    make(of_cache(tmp_path), b"first")
    record = json.loads((tmp_path / "c.json").read_text()) | {"made": json.loads(made)}
    (tmp_path / "c.json").write_text(json.dumps(record))
    assert of_cache(tmp_path).state() is State.MAKE


def test_two_processes_with_other_settings_make_their_targets_in_turn(tmp_path):
    """Without, one process's target comes to lie under the other's record."""
    def work(seed: int, before: float, within: float) -> None:
        time.sleep(before)
        make(of_cache(tmp_path, **{"contexts.seed": seed}), str(seed).encode(), seconds=within)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=args) for args in ((1, 0, 0.4), (2, 0.15, 0))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    seed = json.loads((tmp_path / "c.json").read_text())["decides"]["contexts.seed"]
    assert (tmp_path / "c.npz").read_bytes() == str(seed).encode()


def test_of_two_processes_that_begin_one_folder_with_other_settings_one_is_refused(tmp_path):
    def begin(seed: int) -> None:
        start.wait()
        try:
            of_folder(tmp_path, **{"contexts.seed": seed}).begin()
        except UserError:
            os._exit(2)

    context = multiprocessing.get_context("fork")
    for number in range(10):
        (tmp_path / "run" / "run.json").unlink(missing_ok=True)
        start = context.Barrier(2)
        processes = [context.Process(target=begin, args=(seed,)) for seed in (1, 2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(process.exitcode for process in processes) == [0, 2], number


# ---- what may change -------------------------------------------------------------------------------------------------

def test_what_may_change_is_recorded_anew_on_continuing(tmp_path):
    of_folder(tmp_path, {"fr.epochs": 4}).begin(config={"epochs": 4})
    first = of_folder(tmp_path).file.read_bytes()
    assert of_folder(tmp_path, {"fr.epochs": 4}).begin(config={"epochs": 4}) is State.CONTINUE
    assert of_folder(tmp_path).file.read_bytes() == first
    longer = of_folder(tmp_path, {"fr.epochs": 9})
    assert longer.state() is State.CONTINUE and longer.file.read_bytes() == first
    assert longer.begin(config={"epochs": 9}) is State.CONTINUE
    assert written(longer)["may_change"] == {"fr.epochs": 9} and written(longer)["config"] == {"epochs": 9}
    assert written(longer)["decides"] == DECIDES | {"guidance.interval": [0, 999]}
    refused(of_folder(tmp_path, {"fr.epochs": 12}, **{"contexts.seed": 1}), "was made with contexts.seed = 0, now it is 1")


# ---- records of earlier versions, and damaged ones -------------------------------------------------------------------

def test_a_record_of_format_1_goes_on_where_the_values_agree(tmp_path):
    record = of_folder(tmp_path, {"fr.epochs": 4})
    record.file.parent.mkdir()
    short = {"number": 100, "seed": 0, "source": "uniform", "statistics": "ab12", "interval": [0, 999]}
    record.file.write_text(json.dumps({"decides": short, "versions": {}}))
    assert record.state() is State.CONTINUE and record.begin() is State.CONTINUE
    assert written(record)["format"] == 2 and written(record)["decides"]["contexts.number"] == 100
    assert of_folder(tmp_path, {"fr.epochs": 4}).state() is State.CONTINUE

    file = of_file(tmp_path)
    file.file.write_text(json.dumps({"decides": short}))
    file.target.write_bytes(b"contexts")
    assert file.state() is State.DONE


@pytest.mark.parametrize("changed, name", [({"seed": 7}, "contexts.seed"), ({"batch_size": 5}, "batch_size"),
                                           ({"interval": None}, "guidance.interval")])
def test_a_record_of_format_1_is_refused_where_they_do_not(tmp_path, changed, name):
    record = of_folder(tmp_path)
    record.file.parent.mkdir()
    short = {"number": 100, "seed": 0, "source": "uniform", "statistics": "ab12", "interval": [0, 999]}
    record.file.write_text(json.dumps({"decides": short | changed}))
    refused(record, f"{tmp_path / 'run'}: was begun by an earlier version, which recorded {name} otherwise; finish it with that "
            "version, or set paths.run to another name, or delete that folder")


def test_short_names_are_those_of_format_1_alone(tmp_path):
    record = of_folder(tmp_path)
    record.file.parent.mkdir()
    record.file.write_text(json.dumps({"format": 2, "decides": {"number": 100, "seed": 0, "source": "uniform",
                                                                "statistics": "ab12", "interval": [0, 999]}}))
    refused(record, "was made with contexts.number = None, now it is 100")


@pytest.mark.parametrize("text, words", [
    ("[]", "is no record of how"), ("null", "is no record of how"), ('"ab12"', "is no record of how"),
    ('{"format": 2}', "is no record of how"), ('{"decides": []}', "is no record of how"),
    ('{"format": 2, "deci', "is not valid JSON"), ("", "is not valid JSON"), (b"\xff\xfe{", "is not valid JSON")])
def test_a_damaged_record_is_refused_in_one_line(tmp_path, text, words):
    data = text if isinstance(text, bytes) else text.encode()
    record = of_folder(tmp_path)
    record.file.parent.mkdir()
    record.file.write_bytes(data)
    refused(record, f"{record.file}: {words}", "delete")
    record = of_file(tmp_path)
    record.file.write_bytes(data)
    record.target.write_bytes(b"contexts")
    refused(record, f"{record.file}: {words}", "delete")


# ---- what an earlier stage recorded ----------------------------------------------------------------------------------

def test_what_decided_an_earlier_stage_is_read_from_its_record(tmp_path):
    of_folder(tmp_path).begin()
    found = decided(of_folder(tmp_path).file, ("contexts.seed", "statistics"), "run it again")
    assert found == DECIDES | {"guidance.interval": [0, 999]}


@pytest.mark.parametrize("text, words", [
    (None, "no such file (the record of an earlier stage); run it again"), ("[]", "does not say what a.b was; run it again"),
    ("null", "does not say what a.b was; run it again"), ('{"decides": []}', "does not say what a.b was; run it again"),
    ('{"decides": {"a.c": 1}}', "does not say what a.b was; run it again"), ('{"deci', "is not valid JSON")])
def test_an_earlier_stage_s_record_that_does_not_say_is_refused(tmp_path, text, words):
    file = tmp_path / "align.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        decided(file, ("a.b",), "run it again")
    assert str(error.value).startswith(f"{file}: {words}") and "\n" not in str(error.value)


# ---- what a target was made from, to the stages after it -------------------------------------------------------------

def test_a_source_that_has_changed_is_named_with_the_stage_to_run_again(tmp_path):
    source, record = tmp_path / "in" / "pairs.csv", of_file(tmp_path / "out")
    source.parent.mkdir()
    source.write_text("a,b")
    Record(record.file, DECIDES, "contexts.name", target=record.target, sources=[source]).begin()
    record.target.write_bytes(b"contexts")
    check_sources(record.target, "stage.py")

    os.utime(source, ns=(1, 1))  # other times, same bytes
    check_sources(record.target, "stage.py")
    source.write_text("a,c")
    with pytest.raises(UserError) as error:
        check_sources(record.target, "stage.py")
    assert str(error.value) == (f"{source}: has changed since {record.target} was made from it; put the earlier file back, or "
                                f"delete {record.target} and run stage.py again")
    times = source.stat()
    source.write_text("b,c")  # of the same size and time of writing
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="has changed since"):
        check_sources(record.target, "stage.py")
    source.write_text("a,b")
    check_sources(record.target, "stage.py")
    source.unlink()  # a target may travel alone
    check_sources(record.target, "stage.py")


def test_a_source_that_is_as_it_was_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "pairs.csv").write_text("a,b")
    record = of_file(tmp_path)
    Record(record.file, DECIDES, "contexts.name", target=record.target, sources=[tmp_path / "pairs.csv"]).begin()
    monkeypatch.setattr(records, "file_digest", lambda file: pytest.fail("it was read again"))
    check_sources(record.target, "stage.py")


def test_a_project_that_is_copied_keeps_its_sources(tmp_path):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "pairs.csv").write_text("a,b")
    record = of_file(project / "out")
    Record(record.file, DECIDES, "contexts.name", target=record.target, sources=[project / "data" / "pairs.csv"]).begin()
    shutil.copytree(project, tmp_path / "copy")
    (project / "data" / "pairs.csv").write_text("a,c")
    check_sources(tmp_path / "copy" / "out" / "c.npz", "stage.py")
    (tmp_path / "copy" / "data" / "pairs.csv").write_text("a,d")
    with pytest.raises(UserError, match="copy/data/pairs.csv: has changed"):
        check_sources(tmp_path / "copy" / "out" / "c.npz", "stage.py")


@pytest.mark.parametrize("text", ['{"sources": []}', '{"sources": {"x": 1}}', "[]"])
def test_a_record_whose_sources_are_damaged_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match="c.json: is no record of how .*c.npz was made; delete both, and run stage.py again"):
        check_sources(tmp_path / "c.npz", "stage.py")


def test_asking_what_is_left_sweeps_what_a_killed_process_was_writing(tmp_path):
    """Killed between target and note: the next run finds the target done, and writes nothing itself."""
    record = Record(tmp_path / "record.json", {"a": 1}, "name", target=tmp_path / "target")
    with record.making():
        (tmp_path / "target").write_text("made")
    ended = subprocess.Popen(["true"])
    ended.wait()
    part = tmp_path / f".{HOST}-{ended.pid}-0123abcd.part"
    part.write_text("half")
    assert record.state() is State.DONE and not part.exists()
