"""The site of the project's own history, built by the one command and opened in a browser."""

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASSETS = Path(os.environ.get("RLORA_ASV_ASSETS", ROOT / "asv_bench" / "assets" / "node_modules"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
COMMITS = 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
    pytest.mark.skipif(not importlib.util.find_spec("asv"), reason="asv is not installed"),
    pytest.mark.skipif(
        not ASSETS.is_dir(), reason="no scripts: npm install --prefix asv_bench/assets"
    ),
]


def git(*arguments):
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """URL of the site of the last commits, with the benchmarks of the working tree."""
    if int(git("-C", str(ROOT), "rev-list", "--count", "HEAD") or 0) < COMMITS:
        pytest.skip(f"not a clone with {COMMITS} commits")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    suite = folder / "clone" / "asv_bench"
    made = shutil.ignore_patterns("env", "html", "results", "node_modules", "__pycache__")
    shutil.copytree(ROOT / "asv_bench", suite, dirs_exist_ok=True, ignore=made)
    command = [sys.executable, str(suite / "publish.py"), "--commits", str(COMMITS)]
    # Exact numbers only: seconds a commit, and the page is the same.
    few = ("operations.*'scaled_adamw'", "StateBytes.*'numpy', 'scaled_adamw', 16")
    for name in few:
        command += ["--bench", name]
    command += ["--assets", str(ASSETS), "--machine", "test"]
    env = os.environ | {"HOME": str(folder), "RLORA_ASV_BACKENDS": "numpy,torch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check_counts(done.stdout)
    assert "still loads" not in done.stdout
    with serve(suite / "html") as server:
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def check_counts(printed):
    """Assert that HEAD was measured and that each commit without a result is named.

    A past commit may have been unable to import itself; no later one can mend that.
    """
    measured = int(re.search(rf"(\d+) of {COMMITS} commits measured", printed)[1])
    left_out = re.findall(r"^(\w{8}) (?:could not be measured|has no packages)", printed, re.M)
    assert measured + len(left_out) == COMMITS
    assert git("-C", str(ROOT), "rev-parse", "HEAD")[:8] not in left_out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def serve(folder):
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def look(url, folder):
    """The page once its scripts have run, and what the browser has complained of."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={folder}", "--enable-logging=stderr", "--v=0",
            "--virtual-time-budget=15000", "--window-size=1400,1000", "--dump-dom", url,
        ],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


PAGES = {
    "": ("Operations dispatched in a step", "<canvas"),
    "#/summarylist": ("State", "<table"),
    "#operations.Operations.track_operations": ("64 of 64x64", "flot-tick-label"),
    "#memory.StateBytes.track_state_bytes": ("bytes", "flot-tick-label"),
}


def test_pages_show_their_charts_and_ask_nobody_else(site, tmp_path):
    """One test, because each process that has one would build a site of its own."""
    for page, (text, drawn) in PAGES.items():
        dom, complaints = look(site + page, tmp_path)
        assert text in dom, page
        assert drawn in dom, page
        assert not complaints, page
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?://[^\"]*)", dom)
        assert not loaded, page
