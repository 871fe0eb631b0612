"""Runs beside one another."""
from utils.evaluation.plots import plot_faces
from utils.faces.aligned import write_kept


def test_runs_that_share_no_identity_have_no_common_picture(tmp_path):
    folders = []
    for name in ("a", "b"):
        write_kept(tmp_path / name / "aligned", {f"person {name}": [tmp_path / "0.png"]})
        folders.append(tmp_path / name)
    assert plot_faces(folders) is None
