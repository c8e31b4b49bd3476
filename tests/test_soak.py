import soak
from conftest import not_on_windows


def assert_survived(results):
    for what, tried, survived in results:
        assert survived == tried > 0, what


@not_on_windows
def test_a_run_that_is_killed_ends_like_one_that_is_not():
    assert_survived(soak.round_of_kills(seed=0, epochs=5, kills=3))


@not_on_windows
def test_a_download_survives_broken_servers_and_kills():
    assert_survived(soak.round_of_downloads(seed=0))


def test_a_damaged_picture_is_predicted_or_refused():
    assert_survived(soak.round_of_files(seed=0, count=200))


def test_a_fault_that_is_not_survived_is_counted(monkeypatch):
    rounds = {"kills": lambda seed: [("SIGKILL", 3, 3)], "files": lambda seed: [("bits", 5, 4)]}
    monkeypatch.setattr(soak, "PARTS", rounds)
    rows = soak.soak(minutes=0)
    assert [list(row.values()) for row in rows] == [["kills", "SIGKILL", 3, 3], ["files", "bits", 5, 4]]
