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


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("text", "tokens of 257, at most 4,096; 2 classes"),
        ("retrieval", "pairs, each side tokens of 257, at most 4,000"),
        ("image", "one number a pixel, at most 1,024; 10 classes"),
        ("pathfinder", "one number a pixel, at most 1,024; 2 classes"),
        ("pathx", "one number a pixel, at most 16,384; 2 classes"),
    ],
)
def test_show_every_task(capsys, task, says):
    assert main(["show", task, "source=sample"]) == 0
    out = capsys.readouterr().out
    assert says in out and "made by this project" in out and "first: " in out
    assert out.count("\n") > 30 if task in ("image", "pathfinder", "pathx") else " = " in out  # a picture is drawn


def test_list_names_sources_sizes_and_licences(capsys, tmp_path):
    assert main(["list", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for said in ("84 MB", "170 MB", "8.2 GB", "2.4 GB", "CC BY 4.0", "CC BY-SA 4.0", "no licence stated", "a stand-in"):
        assert said in out
    assert f"written to: {tmp_path}" in out


def test_make_pathfinder_again_reads_what_is_there(capsys, tmp_path):
    line = ["make", "pathfinder", "train=20", "valid=5", "test=5", "paddles=3", "--root", str(tmp_path)]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert "making Pathfinder-32" in printed.err  # progress
    assert main(line) == 0
    again = capsys.readouterr()
    assert again.out == printed.out and "making" not in again.err


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
        (["show", "listops", "train={[]: 1}"], "train must be int | None"),
        (["show", "retrieval", "source=sample", "--seed", "-1"], "seed must be at least 0; got -1"),
        (["make", "listops", "train=1000000000000"], "train must be at most 100,000,000"),
        (["make", "pathfinder", "train=1000000000000"], "train must be at most 100,000,000"),
        (["show", "text", "source=sample", f"length={10**23}"], "length must be at most"),
        (["show", "listops", "seed=3"], "given as --seed 3"),
        (["show", "listops", "size=3"], "no option 'size'"),
        (["show", "listops", "--root", "/no/such/folder"], "does not exist"),
        (["show", "text", "source=imdb", "download=False", "--root", "."], "the IMDB reviews are not here"),
        (["get", "text", "download=False", "--root", "."], "the IMDB reviews are not here"),
        (["get", "image", "download=False", "--root", "."], "CIFAR-10 is not here"),
        (["get", "retrieval", "download=False", "--root", "."], "found no new_aan_pairs.train.tsv"),
        (["get", "pathfinder", "--root", "."], "found no pathfinder32"),
        (["get", "pathx", "--root", "."], "found no pathfinder128"),
        (["get", "speech", "source=sc10", "download=False", "--root", "."], "Speech Commands is not here"),
        (["get", "speech", "source=arabic", "--root", "."], "git clone"),
        (["make", "image"], "recorded, not made"),
        (["get", "listops", "--root", "."], "lra_release.gz"),
    ],
)
def test_mistakes(capsys, arguments, says):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not printed.out
