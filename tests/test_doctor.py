"""The doctor: each illness is found, named and given its mend; a healthy machine is left in peace."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from longseq_tutorial import doctor
from longseq_tutorial.doctor import GIB, ROOT, Facts, examine

NEEDED = {"torch": ("2.6", ""), "jupyterlab": ("4.2", ""), "tyro": ("0.9.17", "train"), "pytest": ("8.2", "test")}
WELL = {"torch": "2.13.0+cpu", "jupyterlab": "4.6.6", "tyro": "1.0", "pytest": "9.2.0"}


def facts(**changes) -> Facts:
    return Facts(**{"needed": NEEDED, "installed": WELL, **changes})


def test_a_healthy_machine_is_left_in_peace():
    assert examine(facts()) == []
    assert "All is well" in doctor.report(facts(), [])


# what is wrong, at which level, words of the finding, words of the mend
ILLNESSES = {
    "old python": (dict(python=(3, 9, 7)), "error", "3.9.7 is outside 3.11 to 3.13", "make lab PYTHON="),
    "new python": (dict(python=(3, 14, 0)), "error", "3.14.0 is outside", "make lab PYTHON="),
    "missing": (dict(installed={**WELL, "torch": None}), "error", "torch (missing)", "pip install -c constraints"),
    "too old": (dict(installed={**WELL, "torch": "2.5.1"}), "error", "torch >= 2.6 (found 2.5.1)", "constraints.txt"),
    "no train": (dict(installed={**WELL, "tyro": None}), "error", "notebooks 10 and 11) needs tyro", "[train,test]"),
    "no test": (dict(installed={**WELL, "pytest": None}), "warning", "make test", "[train,test]"),
    "not installed": (dict(imported_from=None), "error", "cannot import longseq_tutorial", "-e"),
    "other copy": (dict(imported_from="/elsewhere"), "error", "another copy", "--no-deps -e ."),
    "torch broken": (
        dict(broken={"torch": "undefined symbol: iJIT_NotifyEvent"}),
        *("error", "torch does not import", "--force-reinstall -c constraints.txt numpy torch"),
    ),
    "cuda libraries": (
        dict(broken={"torch": "libcudart.so.12: cannot open shared object file"}),
        *("error", "built for CUDA libraries that are not here", "--force-reinstall -c constraints.txt torch"),
    ),
    "numpy mismatch": (
        dict(broken={"torch": "RuntimeError: Numpy is not available"}),
        *("error", "does not fit its neighbours", "numpy torch"),
    ),
    "torchvision": (
        dict(broken={"torchvision": "operator torchvision::nms does not exist"}),
        *("error", "does not fit this torch", "uninstall -y torchvision"),
    ),
    "other module": (
        dict(broken={"ipywidgets": "No module named 'comm'"}),
        *("error", "ipywidgets does not import", "--force-reinstall --no-deps -c constraints.txt ipywidgets"),
    ),
    "gpu, cpu build": (dict(gpu="NVIDIA T4"), "warning", "built without CUDA", "pytorch.org/get-started"),
    "gpu, old driver": (dict(gpu="NVIDIA T4", cuda_build="13.0"), "warning", "CUDA 13.0, cannot", "NVIDIA driver"),
    "no kernel": (dict(kernel=None), "error", "no kernel", "ipykernel install --sys-prefix"),
    "other kernel": (dict(kernel="/usr/bin/python3"), "error", "would run with /usr/bin/python3", "--sys-prefix"),
    "no frontend": (
        dict(widgets_frontend=False, installed={**WELL, "ipywidgets": "8.1"}),
        *("error", "bare text", "jupyterlab_widgets"),
    ),
    "no right, project": (dict(unwritable=(str(ROOT),)), "error", "No right to write", "chown"),
    "no right, jupyter": (dict(unwritable=("/root/x",)), "error", "No right to write in /root/x", "JUPYTER_DATA_DIR"),
    "data nowhere": (dict(environ={"LONGSEQ_DATA": "/no/such"}), "error", "LONGSEQ_DATA=/no/such", "unset"),
    "little memory": (dict(memory=GIB), "warning", "1.0 GiB of memory", "Shut down"),
    "little disk": (dict(disk=GIB // 2), "warning", "0.5 GiB of disk", "Free some"),
    "threads unreadable": (dict(environ={"OMP_NUM_THREADS": "two"}), "warning", "two is no number", "THREADS=1"),
    "threads zero": (dict(environ={"OMP_NUM_THREADS": "0"}), "warning", "0 is no number", "THREADS=1"),
    "too many threads": (dict(threads=8, cores=2), "warning", "8 threads on the 2 cores", "OMP_NUM_THREADS=2"),
    "one thread": (dict(threads=1, cores=4), "warning", "1 thread of 4", "OMP_NUM_THREADS=4"),
}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_each_illness_is_found_alone_with_its_mend(illness):
    changes, level, words, mend = ILLNESSES[illness]
    if "installed" in changes:
        changes = {**changes, "installed": {k: v for k, v in changes["installed"].items() if v is not None}}
    case = facts(**changes)
    (finding,) = examine(case)
    assert finding.level == level
    assert words in finding.what
    assert mend in finding.mend
    text = doctor.report(case, [finding])
    assert finding.what in text and finding.mend in text
    assert ("does not run yet" in text) == (level == "error")


def test_a_gpu_in_use_is_no_illness():
    case = facts(gpu="NVIDIA H200", cuda_build="13.0", cuda_usable=True)
    assert examine(case) == []
    assert "NVIDIA H200" in doctor.report(case, [])


def test_the_wrong_python_silences_all_else():
    assert len(examine(facts(python=(3, 8, 1), installed={}, imported_from=None, kernel=None))) == 1


def test_errors_come_first_and_a_shared_mend_is_spelt_out_once():
    case = facts(installed={"jupyterlab": "4.6"}, threads=1, cores=2)
    findings = examine(case)
    assert [f.level for f in findings] == ["error", "error", "warning", "warning"]
    assert doctor.report(case, findings).count("pip install") == 1


def test_versions_compare_as_packaging_compares_them():
    texts = ["2.6", "2.6.0", "2.13.0", "2.13.0+cpu", "0.9.17", "0.9", "10.1", "9.9.9", "2026.10.18"]
    for a in texts:
        for b in texts:
            theirs = Version(Version(a).public) < Version(Version(b).public)  # without "+cpu", as pip does for >=
            assert (doctor.version(a) < doctor.version(b)) == theirs, (a, b)
    assert doctor.version("no version") == ()


def test_the_projects_own_requirements_are_all_understood():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = doctor.parse_requirements(project)
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *extras["train"], *extras["test"]]
    assert len(needed) == len(lines)
    assert needed["torch"] == ("2.6", "") and needed["tyro"][1] == "train" and needed["ruff"][1] == "test"
    for optional in ("site", "bench"):
        assert not {re.match(r"[\w-]+", line).group() for line in extras[optional]} & set(needed)


def test_a_module_that_crashes_python_is_named_and_does_not_take_the_doctor_along(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os; os._exit(139)")
    (tmp_path / "raising.py").write_text("raise OSError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = doctor._broken(["json", "raising", "crashing"])
    assert set(broken) == {"raising", "crashing"}
    assert "libcublas" in broken["raising"] and "139" in broken["crashing"]


def test_write_access_is_tried(tmp_path):
    assert doctor._writable(tmp_path)
    assert doctor._writable(tmp_path / "not" / "yet" / "there")
    assert not doctor._writable(Path("/proc")) or not Path("/proc").is_dir()


def test_what_the_machine_has_is_plausible():
    assert doctor.cores() >= 1
    memory = doctor.free_memory()
    assert memory is None or memory > 0


def test_a_containers_limits_count(monkeypatch):
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000",
        "/sys/fs/cgroup/memory.max": str(3 * GIB),
        "/sys/fs/cgroup/memory.current": str(GIB),
        "/proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable:   52428800 kB\n",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert doctor.cores() == 2  # a quota of one and a half cores
    assert doctor.free_memory() == 2 * GIB
    files.update({"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"})
    assert doctor.cores() == 16
    assert doctor.free_memory() == 52428800 * 1024


def test_it_needs_only_the_standard_library():
    """``-S`` takes away every installed package; ``-E`` all hints about where they might be."""
    code = "import longseq_tutorial.doctor, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    command = [sys.executable, "-S", "-E", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_command_tells_this_environment_and_exits_by_it(monkeypatch, tmp_path):
    run = [sys.executable, "-m", "longseq_tutorial.doctor"]
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    well = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert well.returncode == 0, well.stdout + well.stderr
    monkeypatch.setenv("LONGSEQ_DATA", str(tmp_path / "nowhere"))
    ill = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert ill.returncode == 1
    assert "LONGSEQ_DATA" in ill.stdout and "Traceback" not in ill.stderr
