"""The command line for data: what it prints, and one line with exit code 2 for every mistake."""

import pytest

from longseq_tutorial.data import main


def test_list_and_show(capsys, tmp_path):
    assert main(["list", "--root", str(tmp_path)]) == 0
    assert "listops: source='generated'" in capsys.readouterr().out
    assert main(["show", "listops", "source=sample"]) == 0
    out = capsys.readouterr().out
    assert "tokens of 16" in out and "train:     120 sequences" in out and "first: [" in out
    assert main(["show", "speech", "source=sample", "normalise=peak"]) == 0
    assert "samples at 8,000 Hz" in capsys.readouterr().out


def test_make(capsys, tmp_path):
    sizes = ["train=20", "valid=5", "test=5", "min_length=5", "max_length=40"]
    assert main(["make", "listops", *sizes, "--root", str(tmp_path), "--seed", "3"]) == 0
    assert "seed 3" in capsys.readouterr().out
    assert list(tmp_path.rglob("00000.npz"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show"], "show needs a task"),
        (["show", "speach"], "unknown task 'speach'"),
        (["make", "speech"], "recorded, not made"),
        (["show", "listops", "train"], "form option=value; got 'train'"),
        (["show", "listops", "train=some"], "train must be int | None; got 'some'"),
        (["show", "listops", "seed=3"], "given as --seed 3"),
        (["show", "listops", "size=3"], "no option 'size'"),
        (["show", "listops", "--root", "/no/such/folder"], "does not exist"),
        (["get", "listops", "--root", "."], "lra_release.gz"),
    ],
)
def test_mistakes(capsys, arguments, says):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not printed.out
