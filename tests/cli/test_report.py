import copy
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from rlora.cli import plots
from rlora.cli.bench import chart_data, html
from rlora.cli.bench.schema import read_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title='pwned'</script>\"'&$x_1$\x1b[31m"
CHECK = {
    "what": "a / b",
    "preset": "p",
    "rank": 4,
    "sense": "at most",
    "limit": 2.0,
    "measured": 1.5,
    "passed": True,
    "stable": True,
    "goal": None,
}
PEAKS = {"backend": "numpy", "device": "cpu", "bytes_per_s": 3e10, "flops_per_s": 1e11}


@pytest.fixture
def make(a_record):
    """Makes a record of rows (method, preset, rank, ratio), each beside its baseline."""

    def record(*rows, **parts):
        template = {
            **a_record["rows"][1],
            "flops": 10**7,
            "bytes_moved": 10**7,
            "model_s": 1e-4,
            "peak_temporary_bytes": 2000,
            "verdict": "ok",
            "ratio_to": "adamw",
        }
        made = []
        for preset, rank in dict.fromkeys((preset, rank) for _, preset, rank, _ in rows):
            plain = {"method": "adamw", "ratio": 1.0, "flops": 0, "state_bytes": 1000}
            made.append({**template, "preset": preset, "rank": rank, **plain})
        for method, preset, rank, ratio in rows:
            interval = [0.9 * ratio, 1.1 * ratio]
            figures = {"ratio": ratio, "ratio_interval": interval, "state_bytes": 500 * rank}
            made.append({**template, "method": method, "preset": preset, "rank": rank, **figures})
        return {**copy.deepcopy(a_record), "rows": made, "peaks": [PEAKS], **parts}

    return record


@pytest.fixture
def everything(make):
    """A record that has the data for every chart."""
    return make(
        ("scaled_adamw", "gpt2-medium", 4, 1.5),
        ("scaled_adamw", "gpt2-medium", 16, 2.5),
        ("lora_rite", "gpt2-medium", 4, 5.0),
        ("lora_rite", "gpt2-medium", 16, 6.0),
        ("scaled_adamw", "256x256*8", 16, 1.25),
        ("scaled_adamw", "512x512*8", 16, 1.5),
        ("scaled_adamw", "512x512*2", 16, 1.75),
        ("scaled_adamw", "512x256*8", 16, 9.0),
    )


@pytest.fixture
def written(rlora_cli, tmp_path):
    """Writes records, makes their report, and reads it."""

    def write(*records, **options):
        paths = []
        for i, record in enumerate(records):
            paths.append(tmp_path / f"record{i}.json")
            paths[-1].write_text(json.dumps(record))
        extra = [x for name, value in options.items() for x in (f"--{name}", value)]
        out = tmp_path / "report.html"
        done = rlora_cli("bench", "report", *paths, "--output", out, *extra)
        assert done.exit_code == 0, done.output
        said = [f"report: {out}, "] + [f"pictures: {x}" for x in options.values()]
        lines = done.output.splitlines()
        assert all(line.startswith(x) for line, x in zip(lines, said, strict=True)), lines
        return out.read_text(encoding="utf-8")

    return write


def by_kind(*records):
    found = {}
    for chart in chart_data.charts(records):
        found.setdefault(chart.kind, []).append(chart)
    return found


def points(chart, method, panel=0):
    (curve,) = [x for x in chart.panels[panel].curves if x.label == method]
    return [*zip(curve.x, curve.y, strict=True)]


def test_every_chart_is_of_the_rows_it_is_about(everything):
    found = by_kind(everything)
    assert list(found) == list(chart_data.KINDS)
    (rank,) = found["overhead-rank"]
    assert rank.where == "gpt2-medium, numpy cpu, float32"
    assert points(rank, "scaled_adamw") == [(4, 1.5), (16, 2.5)]
    assert points(rank, "lora_rite") == [(4, 5.0), (16, 6.0)]
    assert rank.panels[0].curves[0].intervals[0] == (4.5, 5.5)
    (layers,) = found["overhead-layers"]
    assert layers.where == "weights of 512 x 512, rank 16, numpy cpu, float32"
    assert points(layers, "scaled_adamw") == [(2, 1.75), (8, 1.5)]
    (width,) = found["overhead-width"]
    assert width.where == "layers: 8, rank 16, numpy cpu, float32"
    assert points(width, "scaled_adamw") == [(256, 1.25), (512, 1.5)]
    (memory,) = found["memory-rank"]
    assert points(memory, "lora_rite") == [(4, 2.0), (16, 8.0)]
    assert points(memory, "lora_rite", 1) == [(4, 2.0), (16, 2.0)]
    assert points(memory, "adamw") == [(4, 1.0), (16, 1.0)]
    (roof,) = found["roofline"]
    rate = 10**7 / everything["rows"][0]["median_s"] / 1e9
    assert points(roof, "lora_rite") == [(1.0, rate)] * 2
    assert roof.panels[0].roof == (30, 100)
    assert "adamw" not in {curve.label for curve in roof.panels[0].curves}


def test_models_and_backends_have_charts_of_their_own(make):
    rows = [("lora_rite", preset, rank, 2.0) for preset in ("p", "q") for rank in (4, 16)]
    first, second = make(*rows), make(*rows)
    for row in second["rows"]:
        row |= {"backend": "jax", "ratio_to_backend": "jax", "dtype": "bfloat16"}
    where = [chart.where for chart in by_kind(first, second)["overhead-rank"]]
    assert where == [f"{p}, {x}" for x in ("numpy cpu, float32", "jax cpu, bfloat16") for p in "pq"]


def test_other_machines_are_not_mixed_and_newer_rows_win(make):
    old, new = (
        make(*(("lora_rite", "p", rank, ratio) for rank in (4, 16))) for ratio in (2.0, 3.0)
    )
    (chart,) = by_kind(old, new)["overhead-rank"]
    assert points(chart, "lora_rite") == [(4, 3.0), (16, 3.0)]
    new["environment"]["cpu"] = "another"
    found = by_kind(old, new)["overhead-rank"]
    assert [chart.where.rpartition(", ")[2] for chart in found] == ["set-up 1", "set-up 2"]


def test_a_roof_is_that_of_its_device(make):
    rows = make(("scaled_adamw", "gpt2-medium", 4, 1.5))
    faster = {**PEAKS, "device": "cuda:0", "bytes_per_s": 3e12, "flops_per_s": 4e13}
    there = make(("scaled_adamw", "gpt2-medium", 4, 1.5), peaks=[faster])
    for row in there["rows"]:
        row["device"] = "cuda:0"
    roofs = {chart.where: chart.panels[0].roof for chart in by_kind(rows, there)["roofline"]}
    assert sorted(roofs.values()) == [(30.0, 100.0), (3000.0, 40000.0)]
    assert all(("cuda" in where) == (roof[0] > 100) for where, roof in roofs.items())


def test_what_cannot_be_drawn_is_left_out(make):
    record = make(("lora_rite", "p", 4, 2.0), ("lora_rite", "p", 16, 0.0))
    assert set(by_kind(record)) == {"memory-rank", "roofline"}
    for row in record["rows"]:
        row["peak_temporary_bytes"] = None  # one of the two panels would be empty
    assert set(by_kind(record)) == {"roofline"}
    for row in record["rows"]:
        row |= {"flops": None, "state_bytes": 0, "peak_temporary_bytes": None, "rank": [4, 16]}
    assert not by_kind(record)


def test_other_people_stand_beside_the_baseline_they_are_compared_with(make):
    record = make(*(("torch.adamw", "p", rank, 0.5) for rank in (4, 16)))
    for row in record["rows"][2:]:
        row["backend"] = "torch"
    (chart,) = by_kind(record)["overhead-rank"]
    assert chart.where == "p, numpy cpu, float32"
    record["rows"][2]["ratio_to"] = record["rows"][3]["ratio_to"] = "sgd"
    (chart,) = by_kind(record)["overhead-rank"]
    assert [curve.label for curve in chart.panels[0].curves] == ["torch.adamw / sgd"]


def test_the_report_has_the_charts_and_says_which_are_missing(make, everything, written):
    text = written(everything)
    for kind in chart_data.KINDS.values():
        assert f'role="img" aria-label="{kind.title}: ' in text
        assert f"{kind.title} needs" not in text
    assert text.count("<svg") == text.count("<figcaption>") == len(chart_data.KINDS)
    alone = written(make(("lora_rite", "p", 4, 2.0)))
    assert alone.count("<svg") == 1
    assert alone.count("rlora bench run --suite scaling</code>") == 2
    assert alone.count("rlora bench run --rank 4,16,64</code>") == 2


class Tags(HTMLParser):
    """A parser in a browser's place: balanced tags, unique ids, text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        targets = {v for _, k, v in self.attributes if k in ("href", "xlink:href")}
        assert targets <= {f"#{name}" for name in self.ids}

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "input"):
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def poisoned(value):
    """A record with evil in every text that the schema leaves free."""
    if isinstance(value, dict):
        fixed = {"schema", "created", "backend", "ratio_to", "ratio_to_backend"}
        fixed |= {"sense", "preset", "dtype"}
        return {k: v if k in fixed else poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(x) for x in value]
    return f"{value}{EVIL}" if isinstance(value, str) and value != "adamw" else value


def test_everything_of_a_record_is_escaped(everything, written, tmp_path):
    record = poisoned(everything)
    record["checks"] = [{**CHECK, "what": EVIL, "preset": EVIL, "rank": None}]
    record["environment"]["versions"] = {EVIL: EVIL}
    for row in record["rows"]:
        row["preset"] = row["preset"] if "*" in row["preset"] else EVIL
    text = written(record, pictures=tmp_path / "pictures")
    assert text.count("<script>") == 1
    assert "\x1b" not in text
    tags = Tags(text)
    assert [tag for tag, *_ in tags.attributes if tag == "script"] == []
    assert not [name for _, name, _ in tags.attributes if name.startswith("on")]
    assert any(EVIL[:20] in data for data in tags.texts)
    for path in (tmp_path / "pictures").iterdir():
        assert re.fullmatch(r"[A-Za-z0-9.-]+\.(png|svg)", path.name)
        assert b"<script" not in path.read_bytes()


def test_nothing_is_loaded_from_anywhere(everything, written):
    text = written(everything)
    tags = Tags(text)
    loads = [value for _, name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in loads)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<link|<img|<iframe", text)
    (policy,) = [v for _, k, v in tags.attributes if k == "content" and "default-src" in v]
    assert policy.startswith("default-src 'none'; ")


def test_the_page_can_be_read_without_looking(everything, written):
    tags = Tags(written(everything))
    named = {tag: [k for t, k, _ in tags.attributes if t == tag] for tag, *_ in tags.attributes}
    assert named["th"].count("scope") > 10
    assert named["svg"].count("aria-label") == named["svg"].count("role") == len(chart_data.KINDS)
    assert ("label", "for", "search") in tags.attributes
    assert ("html", "lang", "en") in tags.attributes
    assert {"Search", "All rows", "Environment", "Measure it again"} <= set(tags.texts)


def test_partial_and_unstable_are_said(everything, written):
    assert "Partial" not in written(everything)
    everything["rows"][1]["verdict"] = "unstable: spread 20 % > 15 %; close other programs"
    text = written({**everything, "partial": True}, everything)
    assert text.count("Partial: record0.json was interrupted") == 1
    assert "2 of 28 rows are unstable" in text
    assert 'title="spread 20 % &gt; 15 %; close other programs">unstable</span>' in text
    assert "unstable: 2 of 28 rows, spread 20 % &gt; 15 % (close other programs)." in text


def test_a_title_over_several_models_says_what_varies(everything, make, written):
    def title(*records):
        return re.search("<h1>(.*?)</h1>", written(*records))[1]

    assert title(everything) == "What a step costs, by model and rank"
    one = make(("lora_rite", "gpt2-medium", 4, 2.0), ("lora_rite", "gpt2-medium", 16, 2.0))
    assert title(one) == "What a step costs: gpt2-medium"


def test_what_a_record_does_not_know_is_not_called_none(everything, written):
    everything["environment"]["blas"] = [{"library": "mkl", "version": None, "threads": None}]
    text = written(everything)
    assert "<dd>mkl</dd>" in text
    assert "None" not in text.partition("<h2")[2]


def test_checks_on_unstable_rows_are_marked(everything, written):
    text = written({**everything, "checks": [{**CHECK, "stable": False}]})
    assert ">PASS?</span>" in text


def test_checks_are_told(everything, written):
    failed = {**CHECK, "measured": 2.5, "passed": False, "rank": None, "goal": 1.25}
    text = written({**everything, "checks": [CHECK, failed]})
    assert "Targets: 1 of 2 passed." in text
    assert text.count(">PASS<") == text.count(">FAIL<") == 1
    assert "at most 2.00" in text
    assert text.count('<td class="n">1.25</td>') == 1
    assert "PASS" not in written(everything)


def test_two_runs_give_the_same_bytes(everything, tmp_path):
    record = tmp_path / "record.json"
    record.write_text(json.dumps(everything))
    found = []
    for seed in "12":
        out = tmp_path / seed
        command = ["bench", "report", record, "--output", f"{out}.html", "--pictures", out]
        code = "from rlora.cli import main; main()"
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, *command], check=True, env=env, timeout=1200)
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
        found.append({**files, "": (tmp_path / f"{seed}.html").read_bytes()})
    assert found[0] == found[1]
    assert len(found[0]) == 1 + 2 * len(chart_data.KINDS)


def test_pictures_are_files_of_their_own(everything, written, tmp_path):
    folder = tmp_path / "pictures"
    written(everything, pictures=folder)
    names = sorted(path.name for path in folder.iterdir())
    assert "overhead-rank-gpt2-medium-numpy-cpu-float32.svg" in names
    for path in folder.iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        if path.suffix == ".svg":
            assert b"scaled_adamw</text>" in data
            assert b"<metadata" not in data


def test_names_of_pictures_are_never_the_same():
    charts = [chart_data.Chart("roofline", where, []) for where in ("a b", "a-b", "a/b", "x" * 200)]
    from rlora.cli.bench.report import file_names

    names = file_names(charts)
    assert names[:3] == ["roofline-a-b", "roofline-a-b--2", "roofline-a-b--3"]
    assert len(names[3]) == 100


def test_twenty_methods_look_different():
    known = [*plots.ORDER, "scaled_adamw:before", "scaled_adamw:after"]
    looks = [repr(plots.look(name)) for name in known]
    assert len(set(looks)) == len(known)
    assert plots.look("of.another:Optimizer") == plots.look("of.another:Optimizer")
    colors = {plots.look(f"scaled_adamw{x}")["color"] for x in ("", ":after", ":both")}
    assert len(colors) == 1


def test_a_long_or_strange_name_draws(make):
    names = ("_hidden", "of.somebody.else.entirely:AnOptimizerWithALongName", "名前", "$\\frac{")
    record = make(*((name, "x" * 200, rank, 2.0) for name in names for rank in (4, 16)))
    (chart,) = by_kind(record)["overhead-rank"]
    svg = plots.as_svg(chart.title, chart.panels, by_name=True)
    assert "_hidden" in svg
    assert "名前" in svg
    assert "$\\frac{" in svg
    assert plots.as_png(chart.title, chart.panels, by_name=True)


def test_how_to_measure_it_again_is_a_command(make, rlora_cli, tmp_path):
    out = tmp_path / "x.json"
    args = ("--preset", "20x16*3", "--rank", 2, "--method", "scaled_sgd", "--repeat", 1)
    rlora_cli("bench", "run", *args, "--seed", 3, "--output", out)
    assert html.command_of(read_record(out)) == (
        "rlora bench run --backend numpy --method scaled_sgd --rank 2 --preset '20x16*3' "
        "--repeat 1 --seed 3"
    )
    record = make(("lora_rite", "p", 4, 2.0))
    record["command"]["rounds"] |= {"least": 300, "most": 300, "seconds": 12.0}
    assert html.command_of(record).endswith(" --repeat 300 --seconds 12")  # of --repeat no default
    record["command"] |= {"suite": "scaling", "adapter": "a; rm -rf b"}
    record["command"]["rounds"] |= {"least": 7, "most": 100, "seconds": 8.0}
    assert html.command_of(record).startswith("rlora bench run --suite scaling --rank 4")
    assert html.command_of(record).endswith(" --seconds 8")
    assert "--adapter 'a; rm -rf b'" in html.command_of(record)


def test_bad_input_is_one_line(refused, everything, tmp_path, monkeypatch):
    record, out = tmp_path / "x.json", tmp_path / "out.html"
    record.write_text(json.dumps(everything))
    (tmp_path / "file").touch()
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "huge.json").write_text(json.dumps(everything).replace("10000000", "1" * 400))
    everything["rows"][3]["median_s"] = 0.0
    (tmp_path / "zero.json").write_text(json.dumps(everything))
    report = ("bench", "report")
    assert "RECORD" in refused(*report, "--output", out)
    assert "--output" in refused(*report, record)
    assert "is a directory" in refused(*report, record, "--output", tmp_path)
    assert "cannot be written" in refused(*report, record, "--output", tmp_path / "no" / "x.html")
    assert "No such file" in refused(*report, tmp_path / "none.json", "--output", out)
    assert "bad.json is no record" in refused(
        *report, record, tmp_path / "bad.json", "--output", out
    )
    assert "400 digits" in refused(*report, tmp_path / "huge.json", "--output", out)
    assert "rows[3] took no time" in refused(*report, tmp_path / "zero.json", "--output", out)
    pictures = ("--pictures", tmp_path / "file")
    assert "is a file" in refused(*report, record, "--output", out, *pictures)
    monkeypatch.setitem(sys.modules, "rlora.cli.plots", None)
    monkeypatch.delattr("rlora.cli.plots")
    assert "pip install 'rlora[plot]'" in refused(*report, record, "--output", out)
    assert not out.exists()


ACTIONS = """<script>
addEventListener("load", function () {
  function methods() {
    return Array.from(document.querySelectorAll("#rows tbody tr:not([hidden]) th"),
      function (cell) { return cell.textContent; });
  }
  function head(name) {
    return Array.from(document.querySelectorAll("#rows thead th")).find(function (cell) {
      return cell.textContent === name;
    });
  }
  function press(name) {
    head(name).querySelector("button").click();
    return [head(name).getAttribute("aria-sort"), methods()];
  }
  var search = document.getElementById("search");
  var told = {up: press("ratio"), down: press("ratio"), text: press("method")};
  told.none = [press("interval")[1], press("interval")[1]];
  search.value = "LORA_RITE 16";
  search.dispatchEvent(new Event("input"));
  told.found = [methods(), document.getElementById("shown").textContent];
  told.verdict = head("verdict").getBoundingClientRect().right - innerWidth;
  told.wide = document.documentElement.scrollWidth - innerWidth;
  told.loaded = performance.getEntriesByType("resource").map(function (x) { return x.name; });
  document.title = JSON.stringify(told);
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
class TestInABrowser:
    @pytest.fixture
    def look(self, tmp_path):
        def look(text, width=1280):
            path = tmp_path / "page.html"
            path.write_text(text, encoding="utf-8")
            done = subprocess.run(
                [
                    CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                    "--disable-background-networking", "--disable-component-update", "--no-first-run",
                    "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'home'}",
                    "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000",
                    f"--window-size={width},900", "--dump-dom", path.as_uri(),
                ],
                capture_output=True, text=True, timeout=1200, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)

        return look

    def test_it_shows_and_complains_of_nothing(self, everything, written, look):
        record = poisoned(everything)
        dom, complaints = look(written(record))
        assert not complaints
        assert "<title>What a step costs, by model" in dom
        drawn = re.findall(r"<svg.*?</svg>", dom, re.DOTALL)
        assert len(drawn) == len(chart_data.KINDS)
        for svg in drawn:
            assert svg.count("<path") > 10
            assert svg.count("<text") > 5
        assert "scaled_adamw" in dom

    def test_sorting_and_searching_and_no_request(self, everything, written, look):
        everything["rows"][-1]["ratio_interval"] = None
        everything["rows"][-1]["method"] = "no_interval"
        for row in everything["rows"]:
            row["median_s"] = 0.01616  # a figure with the digits of the rank that is searched for
        text = re.sub(r"<meta http-equiv[^>]*>", "", written(everything))
        dom, complaints = look(text.replace("</body>", f"{ACTIONS}</body>"), 500)
        assert not complaints
        told = json.loads(re.search("<title>(.*?)</title>", dom)[1])
        names = {row["method"]: row["ratio"] for row in everything["rows"]}
        assert told["up"][0] == "ascending"
        assert told["down"][0] == "descending"
        assert told["up"][1][:6] == ["adamw"] * 6
        assert told["up"][1][-1] == told["down"][1][0] == max(names, key=names.get)
        assert told["text"] == ["ascending", sorted(told["text"][1])]
        assert [order[-1] for order in told["none"]] == ["no_interval"] * 2
        assert told["found"] == [["lora_rite"], "1 of 14 rows"]
        assert told["wide"] <= 0
        assert told["verdict"] <= 0  # in sight without scrolling
        assert told["loaded"] == []

    def test_a_script_that_got_in_would_not_run(self, everything, written, look):
        text = written(everything)
        dom, complaints = look(text.replace("</body>", f"{ACTIONS}</body>"))
        assert "<title>What a step costs" in dom
        assert any("Content Security Policy" in line for line in complaints)
