"""Each notebook in a real browser: JupyterLab runs it, and its panels answer to keyboard and number box.

Skipped only where no Chromium or Chrome is installed. The notebooks are copied first, so that nothing that
JupyterLab saves reaches the repository.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tests" / "notebooks" / "sample" / "source"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
VIEW = "application/vnd.jupyter.widget-view+json"
TOKEN = "only-for-this-test"
SECONDS = 240_000  # milliseconds, of patience with one notebook on a busy machine

if BROWSER is None:
    pytest.skip("no Chromium or Chrome on this machine", allow_module_level=True)


def panels_in(notebook: Path) -> int:
    """Return how many panels a built notebook shows."""
    nb = nbformat.read(notebook, as_version=4)
    return sum(VIEW in output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", []))


NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if panels_in(path)]
NAMES = ["01_sample.ipynb", *(path.name for path in NOTEBOOKS)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the notebooks, and the sample chapter, built."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(SAMPLE, folder / "source")
    build = [sys.executable, str(ROOT / "notebooks" / "build.py"), "--folder", str(folder), "build"]
    subprocess.run(build, check=True, capture_output=True)
    for path in NOTEBOOKS:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def lab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that serves `folder` on a free loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path_factory.mktemp("config")
    (config / "labconfig").mkdir()
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (config / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(config), "JUPYTER_PREFER_ENV_PATH": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
    command += [f"--LabApp.user_settings_dir={config}/settings", f"--LabApp.workspaces_dir={config}/workspaces"]
    log = (config / "log").open("w")
    server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"JupyterLab did not start:\n{(config / 'log').read_text()}") from None
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield chromium
        chromium.close()


def open_notebook(browser, lab: str, name: str):
    """Open a notebook without the panels of earlier sessions, and wait until its kernel is idle."""
    page = browser.new_page(viewport={"width": 1400, "height": 2000})
    page.goto(f"{lab}/lab/workspaces/{name.split('.')[0]}/tree/{name}?token={TOKEN}&reset")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=SECONDS)
    page.locator('.jp-NotebookPanel [data-status="idle"]').first.wait_for(timeout=SECONDS)
    page.wait_for_timeout(3000)  # JupyterLab drops cells that are sent while it still connects to the kernel
    return page


def run_all(page) -> None:
    """Run every cell, and wait for the last one that computes."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent);
            return prompts.length && prompts.every(text => /^\\[\\d+\\]:/.test(text));
        }""",
        timeout=SECONDS,
    )


def said(panel) -> str:
    """Return what a panel says, once it is there."""
    return panel.locator('[role="status"]').text_content()


def wait_until(page, holds, what: str) -> None:
    """Wait until `holds()`, then until the kernel has nothing left to do."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        page.wait_for_timeout(50)
    page.wait_for_timeout(200)
    page.locator('.jp-NotebookPanel [data-status="idle"]').first.wait_for(timeout=SECONDS)
    page.wait_for_timeout(100)


def position(handle) -> str:
    """Return where a slider stands, as it tells assistive technology."""
    return handle.get_attribute("aria-valuetext")


def exercise(panel) -> int:
    """Move every slider of a panel by keyboard, and back through its number box; return how many changed the words."""
    rows = panel.locator(".widget-hbox").filter(has=panel.page.locator(".widget-slider"))
    return sum(move_and_back(panel, rows.nth(number)) for number in range(rows.count()))


def move_and_back(panel, row) -> bool:
    page, handle, box = panel.page, row.locator('[role="slider"]'), row.locator('input[type="number"]')
    first, place, words = box.input_value(), position(handle), said(panel)
    low, high = (float(box.get_attribute(end)) for end in ("min", "max"))
    if low == high:
        return False  # a module with one channel, say: nothing to choose
    handle.focus()
    page.keyboard.press("ArrowLeft" if float(first) == high else "ArrowRight")
    wait_until(page, lambda: box.input_value() != first, "the number box follows the slider")
    assert position(handle) != place
    changed = said(panel) != words
    box.fill(first)
    box.press("Enter")
    wait_until(page, lambda: position(handle) == place, "the slider follows the number box")
    assert said(panel) == words, "typing the old value back does not give the old words"
    assert panel.locator("img").get_attribute("alt") == words
    return changed


def test_stored_pictures_show_before_anything_is_run(browser, lab: str) -> None:
    """JupyterLab does not trust a notebook that it has not run: figures and panels have to show all the same."""
    page = open_notebook(browser, lab, "01_sample.ipynb")
    for words in ("Pairs against length", "With alpha = 0."):
        picture = page.locator(f'.jp-OutputArea-output img[alt^="{words}"]').first
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("picture => picture.complete && picture.naturalWidth > 100")
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_panels_answer(browser, lab: str, folder: Path, name: str) -> None:
    page = open_notebook(browser, lab, name)
    run_all(page)
    panels = page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.locator('[role="status"]'))
    panels.first.wait_for(timeout=SECONDS)
    for number in range(panels.count()):
        panel = panels.nth(number)
        panel.scroll_into_view_if_needed()
        image = panel.locator("img")
        assert image.get_attribute("alt") == said(panel)
        assert image.evaluate("picture => picture.complete && picture.naturalWidth > 100")
        assert exercise(panel), "no slider changes what the panel says"
        assert "could not be drawn" not in said(panel)
    assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    page.close()


def test_controls_are_named_for_screen_readers(browser, lab: str) -> None:
    page = open_notebook(browser, lab, "01_sample.ipynb")
    run_all(page)
    panel = page.locator(".jp-OutputArea-output .widget-vbox").first
    panel.locator('[role="status"]').wait_for(timeout=SECONDS)
    label = "alpha, weight of the new input"
    assert panel.get_by_text(label).first.is_visible()
    assert panel.get_by_role("spinbutton", name=label).count() == 1
    assert panel.locator('.widget-slider > label[title="' + label + '"]').count() == 1
    assert panel.locator("img").get_attribute("alt") == said(panel)
    page.close()
