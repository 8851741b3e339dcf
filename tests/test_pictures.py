"""tools.plot and tools.routing_page: what is drawn equals run.json, log.csv and the gates."""

import base64
import csv
import html
import itertools
import json
import math
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from tests.conftest import WORLD
from tests.test_tools import greedy, make_adapter, refused, run, slow_gates, tuned
from tools import plot, routing_page
from tools.generate import text_pieces

FAMILIES = ("art", "law", "$x$ and $y$")


COLUMNS = ["step", "loss", "grad_norm", "lr", "tokens_per_second", "val_loss", "exact_match",
           "kept_loss"]


def write_run(folder, families=FAMILIES, steps=150, base=6.0, heads=3, every=0, **settings):
    """A run folder as train.py leaves it, with numbers that tell every place apart."""
    folder.mkdir(parents=True)
    settings = {"method": "hydralora", "heads": heads, "rank": 8, "alpha": 32.0, "dropout": 0.0,
                "gate": "learned", "targets": ["w1", "w2"], "lr": 0.004, "max_steps": 0, "seed": 0,
                "data": f"/somewhere/{folder.name}/train.jsonl", "out": str(folder), **settings}

    def row(i, family):
        return {"val_loss": 0.25 + i / 100 + len(folder.name), "val_loss_base": base + i,
                "exact_match": 0.5 + i / 50, "exact_match_base": i / 100, "records": 5}

    result = {"settings": settings, "fingerprints": {},
              "metrics": {**row(9, ""), "categories": {c: row(i, c)
                                                       for i, c in enumerate(families)}}}
    if heads > 1 and settings["method"] != "full":
        names = [f"layers.{i}.feed_forward.{w}" for i in (0, 1) for w in ("w1", "w2")]
        names.append("output")
        tilt = {name: (3 - i) / 50 for i, name in enumerate(names)}
        result["routing"] = {
            "gate": {name: {c: [(1 + tilt[name] * (i - 1) * (h - (heads - 1) / 2)) / heads
                                for h in range(heads)]
                            for i, c in enumerate(families or [""])} for name in names},
            "entropy": {name: 0.5 + i / 50 for i, name in enumerate(names)}}
    (folder / "run.json").write_text(json.dumps(result))
    losses = [4 / (i + 1) + 0.3 + 0.2 * math.sin(9 * i) for i in range(steps)]
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step, loss in enumerate(losses, start=1):
            found = [loss + 1, step / steps, loss + 2] if every and step % every == 0 else [""] * 3
            writer.writerow([step, loss, 1, 1, 1, *found])
    return folder, result, losses


def drawn(*folders):
    """(axes by title, runs) of the figure of these runs."""
    pytest.importorskip("matplotlib")
    runs = [plot.read_run(folder) for folder in folders]
    plot.add_labels(runs)
    figure = plot.draw(runs)
    axes = {}
    for one in figure.get_axes():
        axes.setdefault(one.get_title().split(" in ")[0], []).append(one)
    return axes, runs


def test_the_losses_drawn_are_those_of_log_csv_thin_and_their_means_thick(tmp_path):
    a, _, losses = write_run(tmp_path / "a")
    b, _, few = write_run(tmp_path / "bb", method="lora", heads=1, steps=40)
    (axes,) = drawn(a, b)[0]["training loss"]
    raw, means, raw_b, means_b = axes.get_lines()
    assert list(raw.get_xdata()) == list(range(1, 151)) and list(raw.get_ydata()) == losses
    assert list(raw_b.get_ydata()) == few
    for line, values in ((means, losses), (means_b, few)):  # 150 // 50 // 2 is one on either side
        want = [sum(part) / len(part) for i in range(len(values))
                for part in [values[max(0, i - 1):i + 2]]]
        assert list(line.get_ydata()) == pytest.approx(want)
    assert means.get_linestyle() != means_b.get_linestyle()
    assert means.get_marker() != means_b.get_marker()
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "nats per token"


def test_a_skipped_step_does_not_spoil_the_mean():
    assert plot.moving_mean([1.0, math.inf, 3.0], 1) == [1.0, 2.0, 3.0]
    assert math.isnan(plot.moving_mean([math.nan], 1)[0])


def test_evaluations_during_a_run_are_points_over_its_loss_and_a_panel_of_exact_match(tmp_path):
    a, _, losses = write_run(tmp_path / "a", every=50)
    b, _, _ = write_run(tmp_path / "b", steps=40)
    axes, _ = drawn(a, b)
    ((title, (loss,)),) = [item for item in axes.items() if item[0].startswith("training loss")]
    assert title == "training loss; diamonds: validation, hollow: texts to keep"
    points = {line.get_markerfacecolor(): line for line in loss.get_lines()
              if line.get_marker() == "D"}
    assert points.keys() == {plot.COLOURS[0], "white"}
    for colour, more in ((plot.COLOURS[0], 1), ("white", 2)):
        assert list(points[colour].get_xdata()) == [50, 100, 150]
        assert list(points[colour].get_ydata()) == [losses[i] + more for i in (49, 99, 149)]
    (line,) = axes["exact match by step"][0].get_lines()
    assert list(line.get_xdata()) == [50, 100, 150]
    assert list(line.get_ydata()) == pytest.approx([100 / 3, 200 / 3, 100])
    assert "exact match by step" not in drawn(b)[0]


def test_a_run_that_has_not_ended_is_drawn_from_log_csv_alone(tmp_path):
    ended, _, _ = write_run(tmp_path / "a", every=50)
    going_on, _, losses = write_run(tmp_path / "b", steps=120, every=50)
    (going_on / "run.json").unlink()
    with open(going_on / "log.csv", "a") as file:
        file.write("121,0.")  # the next row is being written
    axes, (run,) = drawn(going_on)
    assert run.label == "b, not ended, 120 steps"
    ((title, (loss,)),) = [item for item in axes.items() if item[0].startswith("training loss")]
    assert list(loss.get_lines()[0].get_ydata()) == losses
    assert list(axes["exact match by step"][0].get_lines()[0].get_xdata()) == [50, 100]
    assert len(axes) == 2
    # beside a run that has ended it keeps its colour, and the tables are of the other one
    axes, runs = drawn(going_on, ended)
    assert axes[title][0].get_lines()[0].get_color() == plot.COLOURS[0]
    (loss,) = axes["validation loss"]
    assert loss.get_legend_handles_labels()[1] == ["base", runs[1].label]
    assert loss.get_lines()[1].get_color() == plot.COLOURS[1] and runs[1].label == "hydralora"
    other, _, _ = write_run(tmp_path / "c", base=9.0, method="lora")
    axes, runs = drawn(going_on, ended, other)
    labels = axes["validation loss"][0].get_legend_handles_labels()[1]
    assert labels[:2] == [f"base of {run.label}" for run in runs[1:]]


def test_every_family_has_the_loss_and_exact_match_of_the_base_and_each_run(tmp_path):
    found = [write_run(tmp_path / "a"), write_run(tmp_path / "bb", method="lora", heads=1)]
    axes, _ = drawn(*(folder for folder, _, _ in found))
    (loss,), (exact,) = axes["validation loss"], axes["exact match"]
    tables = [{**result["metrics"]["categories"], "all": result["metrics"]}
              for _, result, _ in found]
    names = [*sorted(FAMILIES), "all"]
    assert [text.get_text().replace(r"\$", "$") for text in loss.get_yticklabels()] == names
    want = [(tables[0], "_base"), (tables[0], ""), (tables[1], "")]
    marks = [line for line in loss.get_lines() if line.get_marker() != "None"]
    assert len(marks) == len(exact.containers) == 3
    for mark, bars, (table, end) in zip(marks, exact.containers, want):
        assert list(mark.get_xdata()) == [table[name]["val_loss" + end] for name in names]
        assert [bar.get_width() for bar in bars] == pytest.approx(
            [100 * table[name]["exact_match" + end] for name in names])
        assert [math.floor(y + 0.5) for y in mark.get_ydata()] == [0, 1, 2, 3]  # in its own row
        assert list(mark.get_ydata()) == [bar.get_y() + bar.get_height() / 2 for bar in bars]
    assert len({mark.get_marker() for mark in marks}) == 3
    assert len({bars[0].get_hatch() for bars in exact.containers}) == 3
    assert loss.get_xlabel() == "nats per token" and exact.get_xlabel() == "% of records"
    shown = {text.get_text() for text in loss.texts}
    assert f"{tables[1]['law']['val_loss']:#.3g}" in shown


def test_runs_with_other_families_or_none_share_a_picture(tmp_path):
    a, _, _ = write_run(tmp_path / "a", families=("art", "law"))
    b, other, _ = write_run(tmp_path / "bb", families=("law", "sea"), base=2.0)
    c, _, _ = write_run(tmp_path / "ccc", families=())
    axes, runs = drawn(c, a, b)
    (loss,) = axes["validation loss"]
    assert [text.get_text() for text in loss.get_yticklabels()] == ["art", "law", "sea", "all"]
    marks = {line.get_label(): line for line in loss.get_lines() if line.get_marker() != "None"}
    bases = [label for label in marks if label.startswith("base of ")]
    # those of a and b differ; c's is that of a, which adds its families
    assert [len(marks[label].get_xdata()) for label in bases] == [3, 3]
    assert list(marks[plot.escape(runs[2].label, 40)].get_xdata()) == [
        other["metrics"]["categories"]["law"]["val_loss"],
        other["metrics"]["categories"]["sea"]["val_loss"], other["metrics"]["val_loss"]]
    (alone,) = drawn(c)[0]["validation loss"]
    assert [text.get_text() for text in alone.get_yticklabels()] == ["all"]


def test_the_heat_map_is_the_most_specialised_layer_of_each_run_with_a_router(tmp_path):
    a, result, _ = write_run(tmp_path / "a")
    others = [write_run(tmp_path / "b", method="lora", heads=1)[0],
              write_run(tmp_path / "c", gate="uniform")[0],
              write_run(tmp_path / "d", method="full")[0]]
    axes, _ = drawn(a, *others)
    assert {len(axes[title]) for title in ("mean gate", "entropy of the gate")} == {1}
    (gate,), (entropy,) = axes["mean gate"], axes["entropy of the gate"]
    assert "in layers.0.feed_forward.w1," in gate.get_title()  # whose tilt is the largest
    table = result["routing"]["gate"]["layers.0.feed_forward.w1"]
    assert gate.images[0].get_array().tolist() == [table[name] for name in FAMILIES]
    assert [text.get_text() for text in gate.texts] == [
        f"{w:.2f}" for name in FAMILIES for w in table[name]]
    lines = {line.get_label(): [*zip(*line.get_data())] for line in entropy.get_lines()}
    want = result["routing"]["entropy"]
    assert lines["w1"] == [(i, want[f"layers.{i}.feed_forward.w1"]) for i in (0, 1)]
    assert lines["w2"] == [(i, want[f"layers.{i}.feed_forward.w2"]) for i in (0, 1)]
    assert lines["output"] == [(2, want["output"])]
    assert lines["most divided"] == [(0, want["layers.0.feed_forward.w1"])]
    assert "mean gate" not in drawn(*others)[0]


def test_labels_are_the_method_and_the_settings_that_differ(tmp_path):
    def labels(*runs):
        runs = [plot.read_run(folder) for folder, _, _ in runs]
        plot.add_labels(runs)
        return [run.label for run in runs]

    a = write_run(tmp_path / "a", data="/x/train.jsonl")
    b = write_run(tmp_path / "b", data="/y/train.jsonl", method="lora", heads=1, steps=40)
    full = write_run(tmp_path / "full", data="z.jsonl", method="full", rank=99)
    assert labels(a) == ["hydralora"]
    assert labels(a, b) == ["hydralora, heads 3, steps 150", "lora, heads 1, steps 40"]
    assert labels(a, full) == ["hydralora, data train.jsonl", "full, data z.jsonl"]
    again = write_run(tmp_path / "again", data="/x/train.jsonl")
    assert labels(a, again) == ["hydralora (a)", "hydralora (again)"]


def test_the_command_writes_a_picture_as_wide_as_a_readme_the_same_each_time(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / name, **more)[0] for name, more in
               (("a", {}), ("b", {"method": "full"}))]
    for out in ("one.png", "new/two.png"):
        assert run(plot, *folders, "--out", tmp_path / out) == 0
    picture = (tmp_path / "one.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and int.from_bytes(picture[16:20], "big") == 830
    assert (tmp_path / "new" / "two.png").read_bytes() == picture
    assert capsys.readouterr().out.count("wrote ") == 2


def test_without_matplotlib_the_picture_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, _, _ = write_run(tmp_path / "a")
    line = refused(capsys, plot, folder, "--out", tmp_path / "a.png")
    assert "matplotlib is not installed" in line and not (tmp_path / "a.png").exists()


def test_a_folder_without_a_whole_run_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, result, _ = write_run(tmp_path / "a")

    def attempt(out="a.png"):
        return refused(capsys, plot, folder, "--out", tmp_path / out)

    assert "must end in .png" in attempt("a.pdf")
    log = (folder / "log.csv").read_text()
    for text in ("", log.splitlines()[0] + "\n", log + "151,much,,,,,,\n"):
        (folder / "log.csv").write_text(text)
        assert "run.json or log.csv is damaged" in attempt()
    (folder / "log.csv").write_text(log)
    for key in ("metrics", "settings"):
        (folder / "run.json").write_text(json.dumps({**result, key: None}))
        assert "run.json or log.csv is damaged" in attempt()
    (folder / "run.json").unlink()
    (folder / "log.csv").unlink()
    assert "holds no run.json and no log.csv" in attempt()


# ---------------------------------------------------------------- the page of the router

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
HOSTILE = "</script><script>document.title = 'owned'</script><!-- <b>&amp; @DATA@ \u2028 naïve 😀"
# what a reader does and sees, tried on the page itself
READER = """
<script>
const seen = {width: innerWidth, content: document.documentElement.scrollWidth, views: {}};
const tokens = () => [...document.querySelectorAll(".token")];
const texts = selector => [...document.querySelectorAll(selector)].map(node => node.textContent);
const ground = node => getComputedStyle(node).backgroundColor;
function look() {
  return {tints: tokens().map(ground), heads: texts(".token small"),
          bands: tokens().map(node => getComputedStyle(node.lastChild).backgroundImage),
          labels: tokens().map(node => node.ariaLabel),
          cells: texts("#tables td"), rows: texts("#tables tbody th"),
          content: document.documentElement.scrollWidth};
}
function turnTo(value) {
  at("layer").value = value;
  at("layer").dispatchEvent(new Event("change"));
}
function press(key) {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
}
const options = [...document.querySelectorAll("#layer option")];
seen.options = options.map(option => option.textContent);
for (const option of options) { turnTo(option.value); seen.views[option.value] = look(); }
at("after").click();
seen.wrapped = at("layer").value;
at("before").click();
seen.back = at("layer").value;
turnTo(0);
seen.pieces = [...document.querySelectorAll(".token:not(.mark) span")].map(n => n.textContent);
tokens()[2].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
seen.hovered = at("panel").innerText;
tokens()[0].focus();
press("ArrowRight"); press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
seen.focused = tokens().indexOf(document.activeElement);
seen.stops = tokens().filter(node => node.tabIndex === 0).length;
press("End");
seen.ended = tokens().indexOf(document.activeElement);
const legend = [...document.querySelectorAll("#legend button")];
legend[0].click();
seen.pressed = legend.map(button => button.ariaPressed);
seen.off = look();
legend.slice(1).forEach(button => button.click());
seen.none = look();
legend.forEach(button => button.click());
seen.colours = ["h1", "h2", "p", ".token", ".token small", "#legend button", "#legend i", "td",
                "select", "#panel", ".part > b", "caption", "th"].flatMap(selector =>
  [...document.querySelectorAll(selector)].map(node => {
    let under = node;
    while (/, 0\\)$/.test(ground(under)) && under.parentElement) under = under.parentElement;
    return [selector, getComputedStyle(node).color, ground(under)];
  }));
seen.title = document.title;
seen.scripts = document.querySelectorAll("script").length;
seen.buttons = tokens().every(node => node.tagName === "BUTTON");
top.document.body.append(Object.assign(top.document.createElement("pre"),
                                       {id: "seen", textContent: JSON.stringify(seen)}));
</script>
"""


def browse(path, tmp_path, width, *flags):
    """What READER saw on the page in a real browser of this width, and what the console said."""
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    tried = tmp_path / "tried.html"
    page = path.read_text(encoding="utf-8").replace("</body>", READER + "</body>")
    if width < 500:  # no window is narrower, but a frame is
        page = (f'<body style="margin: 0"><iframe srcdoc="{html.escape(page)}" '
                f'style="width: {width}px; height: 900px; border: 0"></iframe></body>')
    tried.write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--disable-quic",
               "--enable-logging=stderr", "--v=0", f"--window-size={width},900", *flags,
               "--dump-dom", tried.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console


def luminance(colour):
    """Relative luminance, as WCAG defines it, of rgb(...) or color(srgb ...)."""
    channels = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", colour)[:3]]
    channels = [x / 255 for x in channels] if colour.startswith("rgb") else channels
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def strongest(w):
    """The first of the largest, to a thousandth, in each row."""
    rows = (w * 1000).round().tolist()
    return [row.index(max(row)) for row in rows]


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def embedded(path):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>',
                     path.read_text(encoding="utf-8"), re.S)[1]


def unpacked(text, layers, heads):
    values = struct.unpack(f"<{len(base64.b64decode(text)) // 2}h", base64.b64decode(text))
    return torch.tensor(values).view(-1, layers, heads) / 1000


@pytest.fixture
def routed(weights, tokenizer, tmp_path):
    """(path of a page of two prompts, their tokens, their gates by a slow twin)."""
    adapter = make_adapter(weights, tmp_path / "a.pt", targets=("w1", "w2"))
    prompts, out = ["What is 3?\nOr 4?", HOSTILE], tmp_path / "new" / "routing.html"
    assert run(routing_page, *prompts, "--weights", weights, "--adapter", adapter, "--out", out,
               "--max-new-tokens", 5) == 0
    model, rows = tuned(weights, adapter), []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, eos=True)
        rows.append((ids, greedy(model, tokenizer, ids, 5)))
    return out, rows, [slow_gates(model, ids + new) for ids, new in rows]


def test_the_page_holds_the_text_and_the_gates_of_prompt_and_answer(routed, tokenizer):
    path, rows, gates = routed
    data = json.loads(embedded(path))
    assert data["layers"] == list(gates[0]) and data["heads"] == 3
    together = {name: torch.cat([gate[name] for gate in gates]) for name in gates[0]}
    assert data["layers"][data["divided"]] == max(
        together, key=lambda name: together[name].std(0, correction=0).mean())
    assert len(data["texts"]) == 2
    for text, (ids, new), gate in zip(data["texts"], rows, gates):
        assert text["prompt"] == len(ids) and len(text["tokens"]) == len(ids) + len(new)
        assert "".join(piece for piece, _ in text["tokens"][:len(ids)]) == tokenizer.decode(ids)
        assert [mark for _, mark in text["tokens"][:len(ids)] if mark in ("BOS", "EOS")] == [
            "BOS", "EOS"]
        want = torch.stack([*gate.values()], 1)
        assert torch.allclose(unpacked(text["gates"], 4, 3), want, atol=6e-4)
    means = torch.stack([torch.stack([w.mean(0) for w in gate.values()]) for gate in gates])
    (table,) = data["tables"]
    assert table["rows"] == ["prompt 1", "prompt 2"]
    assert torch.allclose(unpacked(table["gates"], 4, 3), means, atol=6e-4)
    assert torch.allclose(unpacked(data["all"], 4, 3)[0],
                          torch.stack([w.mean(0) for w in together.values()]), atol=6e-4)


def test_a_hostile_prompt_stays_text(routed, tokenizer):
    path, rows, _ = routed
    page = path.read_text(encoding="utf-8")
    assert "<" not in embedded(path) and page.count("<script") == 2
    text = json.loads(embedded(path))["texts"][1]
    shown = "".join(piece for piece, _ in text["tokens"][:text["prompt"]])
    assert shown == tokenizer.decode(rows[1][0]) and "document.title" in shown
    assert {"byte", "BOS", "EOS"} <= {mark for _, mark in text["tokens"]}  # of the 😀
    assert not re.search(r"(src|href)=|https?:|url\(|@import|fetch\(", page)  # no network


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_the_numbers_shown_are_the_gates_and_the_switches_work(
        routed, tmp_path, width):
    path, rows, gates = routed
    seen, console = browse(path, tmp_path, width)
    assert console == [] and seen["title"] == "Which head takes which token"
    assert seen["width"] == width >= seen["content"] and seen["scripts"] == 3 and seen["buttons"]
    assert all(view["content"] <= width for view in seen["views"].values())
    names = list(gates[0])
    assert [option.split(" (")[0] for option in seen["options"]] == [*names, "all layers"]
    assert (seen["wrapped"], seen["back"]) == ("0", "4")
    together = [torch.cat([gate[name] for gate in gates]) for name in names]
    for layer, w in enumerate(together):
        view = seen["views"][str(layer)]
        assert view["heads"] == [str(head + 1) for head in strongest(w)]
        for label, row in zip(view["labels"], w.tolist(), strict=True):
            numbers = re.findall(r"head \d (\d\.\d{3})", label)
            assert [float(x) for x in numbers[-3:]] == pytest.approx(row, abs=6e-4)
        means = [gate[names[layer]].mean(0).tolist() for gate in gates]
        assert [float(x) for x in view["cells"]] == pytest.approx(sum(means, []), abs=6e-4)
    tints = [seen["views"][str(layer)]["tints"] for layer in range(4)]
    assert all(a != b for a, b in itertools.combinations(tints, 2))
    every = seen["views"]["4"]
    for i, stack in enumerate(every["heads"]):
        assert stack.split() == [str(strongest(w[i:i + 1])[0] + 1) for w in together]
    assert len(set(every["bands"])) > 5 and every["rows"][-4:] == names
    assert [float(x) for x in every["cells"][-12:]] == pytest.approx(
        [x for w in together for x in w.mean(0).tolist()], abs=6e-4)
    hovered = [float(x) for x in re.findall(r"head \d (\d\.\d{3})", seen["hovered"])]
    assert hovered == pytest.approx(together[0][2].tolist(), abs=6e-4)


@pytest.mark.slow
def test_in_a_browser_keys_and_legend_work_and_text_is_text(routed, tokenizer, tmp_path):
    path, rows, gates = routed
    seen, _ = browse(path, tmp_path, 1280)
    want = ["".join(text_pieces(tokenizer, part)) for row in rows for part in row]
    assert "".join(seen["pieces"]) == "".join(want).replace("\n", "↵")
    assert seen["focused"] == 2 and seen["stops"] == 2  # one for each text
    assert seen["ended"] == sum(map(len, rows[0])) - 1
    assert seen["pressed"] == ["false", "true", "true"]
    w = torch.cat([gate[list(gates[0])[0]] for gate in gates])
    kept = [(head + 1, row[head + 1] >= 0.333) for head, row in zip(strongest(w[:, 1:]), w)]
    assert seen["off"]["heads"] == [str(head + 1) if much else "\u00a0" for head, much in kept]
    assert set(seen["none"]["heads"]) == {"\u00a0"} and len(set(seen["none"]["tints"])) == 1
    assert [float(x) for x in seen["none"]["cells"]] == [float(x) for x in seen["off"]["cells"]]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--blink-settings=preferredColorScheme=0"]],
                         ids=["light", "dark"])
def test_in_a_browser_text_has_a_contrast_of_at_least_4_5(weights, tmp_path, flags):
    adapter = make_adapter(weights, tmp_path / "a.pt", heads=8)
    run(routing_page, "What is 3 plus 4?", "--weights", weights, "--adapter", adapter,
        "--out", tmp_path / "r.html", "--max-new-tokens", 30)
    seen, console = browse(tmp_path / "r.html", tmp_path, 1280, *flags)
    low = min(seen["colours"], key=lambda found: contrast(*found[1:]))
    assert contrast(*low[1:]) >= 4.5 and console == [], low
    (text,) = {colour for selector, colour, _ in seen["colours"] if selector == "h1"}
    assert (luminance(text) > 0.5) == bool(flags)  # it is dark where dark is preferred
    full = [under for selector, _, under in seen["colours"] if selector == "#legend i"]
    assert len(set(full)) == 8  # the deepest tint of every head is among those compared


def test_the_page_of_200_tokens_96_layers_and_8_heads_is_below_2_mb():
    gates = {f"layers.{i}.feed_forward.w{j}": torch.rand(200, 8).softmax(-1)
             for i in range(32) for j in (1, 2, 3)}
    text = {"name": "long", "expected": None, "prompt": 100, "tokens": [["token", ""]] * 200}
    assert len(routing_page.page(routing_page.page_data([text], [gates])).encode()) < 2e6


@pytest.mark.slow
def test_without_prompts_there_is_a_record_of_each_family_and_the_runs_own_table(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "hydralora"
    folder.mkdir(parents=True)
    make_adapter(WORLD / "base", folder / "adapter.pt", rank=8)
    names = [f"layers.{i}.feed_forward.{w}" for i in range(6) for w in ("w1", "w3", "w2")]
    gate = {name: {"sea": [i / 20, 1 - i / 20, 0.0], "land": [0.0, 0.0, 1.0]}
            for i, name in enumerate(names)}
    # run.json has the layers in the order of the model's modules, the page in that of the pass
    shuffled = {name: gate[name] for name in sorted(gate)}
    for own, count in ((shuffled, 2), ({"other": gate[names[0]]}, 1)):
        routing = {"gate": own, "entropy": dict.fromkeys(own, 0.5)}
        (folder / "run.json").write_text(json.dumps({"fingerprints": {}, "routing": routing}))
        assert run(routing_page, "--out", "r.html", "--max-new-tokens", 2) == 0
        data = json.loads(embedded(tmp_path / "r.html"))
        assert len(data["tables"]) == count
        if count == 2:
            assert data["tables"][1]["rows"] == ["sea", "land"]
            table = unpacked(data["tables"][1]["gates"], 18, 3)
            assert torch.allclose(table[0], torch.tensor([by["sea"] for by in gate.values()]))
    records = [json.loads(line) for line in open(WORLD / "val.jsonl", encoding="utf-8")]
    assert [text["name"] for text in data["texts"]] == list(
        dict.fromkeys(record["category"] for record in records))
    assert data["texts"][0]["expected"] == records[0]["response"]


def test_a_page_needs_a_router(weights, tmp_path, capsys):
    def attempt(*argv):
        return refused(capsys, routing_page, "one", "--weights", weights, "--out",
                       tmp_path / "r.html", *argv)

    assert "no router" in attempt()
    for settings in ({"heads": 1}, {"gate": "uniform"}):
        adapter = make_adapter(weights, tmp_path / "one.pt", **settings)
        assert "has no router" in attempt("--adapter", adapter)
    assert not (tmp_path / "r.html").exists()
