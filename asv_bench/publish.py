#!/usr/bin/env python
"""Build the asv site of the last commits, in the environment that runs this. Installs nothing.

    python asv_bench/publish.py --commits 10

For each commit, oldest first: its packages are laid out in a temporary folder, found before any
installed rlora, and measured by the benchmarks as they are now; then ``asv publish``. What a commit
does not have is a blank in its row. Results lie in asv_bench/results, the site in asv_bench/html.
"""

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK = (
    "operations",
    "StateBytes.*'(numpy|torch)'.* 16,",
    "imports",
    "pairing",
    r"OverheadRatio.*'(numpy|torch)', '(adamw|scaled_\w+|lora_rite)', 16,",
)
"""A minute a commit: exact numbers, and of the times what matters most."""


ALONE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable___rlora" not in f.__module__]
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 when no commit gave a result or asv could not publish."""
    command = parser()
    options = command.parse_args(argv)
    if options.commits < 1:
        command.error(f"--commits must be at least 1, got {options.commits}")
    commits = history(options.rev, options.commits)
    on = ("--machine", options.machine) if options.machine else ()
    if asv("machine", "--yes", *on):
        return 1
    measured = sum(run(commit, options.bench or QUICK, on) for commit in commits)
    say(f"{measured} of {len(commits)} commits measured")
    if not measured or asv("publish"):
        return 1
    for url in localise(HERE / "html", options.assets):
        say(f"the page still loads {url}; see --assets")
    say(f"look at it: {Path(sys.executable).name} -m http.server -d {HERE / 'html'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--commits", type=int, default=10, help="how many, of the first parents of --rev"
    )
    p.add_argument("--rev", default="HEAD", help="the newest commit")
    p.add_argument(
        "--bench", action="append", help="regular expression, as asv takes it; repeatable"
    )
    p.add_argument(
        "--machine", help="the name under which results are kept; asv's own if not given"
    )
    p.add_argument(
        "--assets",
        type=Path,
        default=HERE / "assets" / "node_modules",
        help="folder with the scripts that asv's page loads from elsewhere; "
        "`npm install --prefix asv_bench/assets` fills the default",
    )
    return p


def history(rev: str, count: int) -> list[str]:
    """Hashes, oldest first."""
    lines = git("rev-list", "--first-parent", "-n", str(count), rev).decode().split()
    return lines[::-1]


def run(commit: str, benchmarks: tuple[str, ...] | list[str], on: tuple[str, ...]) -> bool:
    """Measure one commit on a machine; whether there is anything to show for it."""
    with tempfile.TemporaryDirectory() as folder:
        site = lay_out(commit, Path(folder))
        if site is None:
            say(f"{commit[:8]} has no packages to lay out; left out")
            return False
        named = (word for name in benchmarks for word in ("--bench", name))
        # No --quick, which saves nothing. One round: asv cannot interleave commits here anyway.
        few = ("-a", "rounds=1", "-a", "repeat=5")
        arguments = ("-E", "existing:same", "--set-commit-hash", commit, *few, *on)
        code = asv("run", *arguments, *named, path=str(site))
    if code not in (0, 2):  # 2: some benchmark failed, and the result says which
        say(f"{commit[:8]} could not be measured: asv ended with {code}")
    return code in (0, 2)


def lay_out(commit: str, folder: Path) -> Path | None:
    """The packages of a commit as an installation would have them, or None if it has none."""
    source, site = folder / "source", folder / "site"
    git("clone", "-q", "--shared", "--no-checkout", ".", str(source))
    git("-C", str(source), "checkout", "-q", commit)
    config = source / "pyproject.toml"
    settings = tomllib.loads(config.read_text()) if config.exists() else {}
    mapped = settings.get("tool", {}).get("setuptools", {}).get("package-dir", {})
    for package, path in sorted(mapped.items()):
        shutil.copytree(source / path, site.joinpath(*package.split(".")), dirs_exist_ok=True)
    if mapped:
        # Else an editable installation would fill in what this commit did not have yet.
        (site / "sitecustomize.py").write_text(ALONE)
    return site if mapped else None


def localise(html: Path, assets: Path) -> list[str]:
    """Let the page load what it needs from beside itself; give what was not found."""
    page = html / "index.html"
    text, missing = page.read_text(encoding="utf-8"), []
    for tag in re.findall(r"<(?:script|link)\b[^>]*https://[^>]*>", text):
        url = re.search(r"https://[^\"']+", tag)[0]
        found = find(url.rpartition("/")[2], tag, assets)
        if found is None:
            missing.append(url)
            continue
        (html / "vendor").mkdir(exist_ok=True)
        shutil.copy(found, html / "vendor" / found.name)
        # The hash was that of another build of the same version.
        plain = re.sub(r'\s(integrity|crossorigin|referrerpolicy)="[^"]*"', "", tag)
        text = text.replace(tag, plain.replace(url, f"vendor/{found.name}"))
    page.write_text(text, encoding="utf-8")
    return missing


def find(name: str, tag: str, assets: Path) -> Path | None:
    """The file of that name: the one of the hash in the tag, else the one least deep."""
    unversioned = re.sub(r"-\d[\d.]*\d", "", name)
    for wanted in (name, unversioned, unversioned.replace(".min.", ".")):
        files = sorted(assets.rglob(wanted), key=lambda path: (len(path.parts), path))
        for path in files:
            if digest(path, "sha256") in tag or digest(path, "sha512") in tag:
                return path
        if files:
            return files[0]
    return None


def digest(path: Path, kind: str) -> str:
    """A hash as pages state it."""
    return base64.b64encode(hashlib.new(kind, path.read_bytes()).digest()).decode()


def asv(*arguments: str, path: str | None = None) -> int:
    """Run asv on this suite, with a folder from which rlora is to be imported; its exit code."""
    env = dict(os.environ)
    if path:  # the first for asv's own processes, the second for those that they start
        env |= {"ASV_PYTHONPATH": path, "PYTHONPATH": path}
    command = [sys.executable, "-m", "asv", arguments[0], "--config", str(HERE / "asv.conf.json")]
    return subprocess.run([*command, *arguments[1:]], env=env, check=False).returncode  # noqa: S603


def git(*arguments: str) -> bytes:
    """Run git, and return what it prints."""
    command = ["git", "-C", str(HERE.parent), *arguments]
    done = subprocess.run(command, check=False, capture_output=True)  # noqa: S603
    if done.returncode:
        sys.exit(done.stderr.decode().strip() or f"git ended with {done.returncode}")
    return done.stdout


def say(line: str) -> None:
    """One line for whoever waits."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
