"""Workflows may do no more than they must, and what they and developers install is locked by hash."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
WORKFLOWS = [
    *sorted((ROOT / ".github" / "workflows").glob("*.yml")),
    *sorted((ROOT / "docs" / "how-to" / "workflows").glob("*.yml")),
]
LOCKS = {
    "requirements-dev.txt": None,
    ".github/build.txt": ".github/build.in",
    ".github/audit.txt": ".github/audit.in",
}

# --- workflows -----------------------------------------------------------------------------------


def faults(text):
    """Faults of a workflow; ours have none."""
    workflow = yaml.safe_load(text)
    triggers = workflow[True]  # "on", which YAML 1.1 takes for a boolean
    if workflow.get("permissions") != {}:
        yield "permissions are not {} for jobs that say nothing"
    if "pull_request_target" in triggers:
        yield "pull_request_target runs with the rights of the base"
    for name, job in workflow["jobs"].items():
        if not isinstance(job.get("permissions"), dict) or "timeout-minutes" not in job:
            yield f"{name} does not say its permissions and its time"
        for step in job["steps"]:
            yield from faults_of_step(step)
    for line in re.findall(r"uses: (.*)", text):
        if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line):
            yield f"{line} is not pinned to a commit and its version"
    if "secrets." in text:
        yield "a stored secret"


def faults_of_step(step):
    if step.get("uses", "").startswith("actions/checkout@"):
        kept = step.get("with", {}).get("persist-credentials")
        if kept is not False:
            yield "a checkout leaves its credentials behind"
    if "${{" in step.get("run", ""):
        yield "an expression is pasted into a script"
    for line in step.get("run", "").splitlines():
        bare = re.search(r"pip install(?!.*(--require-hashes|--no-deps|--index-url|\[bench))", line)
        if bare:
            yield f"{line.strip()} installs what is not locked"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_do_no_more_than_they_must(path):
    assert list(faults(path.read_text())) == []


GOOD = """
on: {push: {}}
permissions: {}
jobs:
  a:
    permissions: {contents: read}
    timeout-minutes: 5
    steps:
      - uses: actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1
        with: {persist-credentials: false}
      - run: make
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("permissions: {}\n", ""),
        ("permissions: {}\n", "permissions: write-all\n"),
        ("    permissions: {contents: read}\n", ""),
        ("    timeout-minutes: 5\n", ""),
        ("@3d3c42e5aac5ba805825da76410c181273ba90b1 #", "@v7 #"),
        (" # v7.0.1", ""),
        ("persist-credentials: false", "fetch-depth: 0"),
        ("run: make", 'run: echo "${{ github.event.issue.title }}"'),
        ("run: make", "run: pip install zizmor"),
        ("run: make", "env: {TOKEN: '${{ secrets.TOKEN }}'}"),
        ("push: {}", "pull_request_target: {}"),
    ],
)
def test_the_guard_of_workflows_sees_what_it_should(old, new):
    assert list(faults(GOOD)) == []
    assert old in GOOD
    assert len(list(faults(GOOD.replace(old, new)))) == 1


def test_an_action_is_used_at_one_commit():
    uses = re.findall(r"uses: ([\w-]+/[\w-]+)\S*@(.*)", "\n".join(p.read_text() for p in WORKFLOWS))
    assert len({action for action, _ in uses}) == len(set(uses))
    assert len(WORKFLOWS) >= 8


def test_a_release_is_published_without_a_secret_and_under_the_name_of_its_tag():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    build, publish = (yaml.safe_load(text)["jobs"][name] for name in ("build", "publish"))
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert publish["environment"]["name"] == "pypi"
    assert publish["steps"][-1]["with"] == {"attestations": True}
    assert any("attest-build-provenance" in step.get("uses", "") for step in build["steps"])
    assert any("$GITHUB_REF_NAME" in step.get("run", "") for step in build["steps"])


def test_new_versions_wait_a_week():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"github-actions", "pip"}
    assert all(update["cooldown"]["default-days"] >= 7 for update in updates)


# --- locks ---------------------------------------------------------------------------------------


def locked(text):
    """Requirements of a lock, by name, each with its hashes."""
    found = {}
    for block in re.split(r"\n(?=[\w-])", text):
        if not block.startswith("#"):
            requirement = Requirement(block.split("\\")[0].strip())
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
            found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


def wanted(lock):
    """Requirements that a lock was made of."""
    if LOCKS[lock]:
        return (ROOT / LOCKS[lock]).read_text().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needs = [*project["dependencies"], *(need for extra in extras for need in extra)]
    return [need for need in needs if not need.startswith("rlora[")]


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_is_locked_within_its_bounds(name):
    found = locked((ROOT / name).read_text())
    for need in map(Requirement, wanted(name)):
        lines = found.get(canonicalize_name(need.name), [])
        assert lines, f"{need.name} is not in {name}: make it anew, as its first lines say"
        for line, _ in lines:
            assert Version(next(iter(line.specifier)).version) in need.specifier, (line, need)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_one_version_and_hashes_and_no_address(name):
    text = (ROOT / name).read_text()
    for lines in locked(text).values():
        for requirement, hashes in lines:
            assert [s.operator for s in requirement.specifier] == ["=="], requirement
            assert hashes, requirement
            assert requirement.url is None
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)  # no index, no other file


def test_the_guard_of_locks_sees_what_it_should():
    text = "# made by uv\na==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n    # via b\nb==2\n"
    found = locked(text)
    assert [hashes for [(_, hashes)] in found.values()] == [["0" * 64], []]
    assert len(locked((ROOT / "requirements-dev.txt").read_text())) > 100
