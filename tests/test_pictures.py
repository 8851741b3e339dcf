"""tools.plot and tools.routing_page: what is drawn equals run.json, log.csv and the gates."""

import csv
import json
import math
import sys

import pytest

from tests.test_tools import refused, run
from tools import plot

FAMILIES = ("art", "law", "$x$ and $y$")


def write_run(folder, families=FAMILIES, steps=150, base=6.0, heads=3, layers=2, log=None,
              **settings):
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
        names = [f"layers.{i}.feed_forward.{w}" for i in range(layers) for w in ("w1", "w2")]
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
        writer.writerow(["step", "loss", "grad_norm", "lr", "tokens_per_second"])
        writer.writerows([i + 1, loss, 1, 1, 1] for i, loss in enumerate(losses))
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
    assert plot.smoothed([1.0, math.inf, 3.0], 1) == [1.0, 2.0, 3.0]
    assert math.isnan(plot.smoothed([math.nan], 1)[0])


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
    axes, runs = drawn(a, b, c)
    (loss,) = axes["validation loss"]
    assert [text.get_text() for text in loss.get_yticklabels()] == ["art", "law", "sea", "all"]
    marks = {line.get_label(): line for line in loss.get_lines() if line.get_marker() != "None"}
    bases = [label for label in marks if label.startswith("base of ")]
    assert len(bases) == 2  # theirs differ; the base of the third is that of the first
    assert list(marks[plot.plain(runs[1].label, 40)].get_xdata()) == [
        other["metrics"]["categories"]["law"]["val_loss"],
        other["metrics"]["categories"]["sea"]["val_loss"], other["metrics"]["val_loss"]]
    (alone,) = drawn(c)[0]["validation loss"]
    assert [text.get_text() for text in alone.get_yticklabels()] == ["all"]


def test_the_heat_map_is_the_most_divided_layer_of_each_run_with_a_router(tmp_path):
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


def test_without_matplotlib_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, _, _ = write_run(tmp_path / "a")
    line = refused(capsys, plot, folder, "--out", tmp_path / "a.png")
    assert "matplotlib is not here" in line and not (tmp_path / "a.png").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, result, _ = write_run(tmp_path / "a")

    def attempt(out="a.png"):
        return refused(capsys, plot, folder, "--out", tmp_path / out)

    assert "must end in .png" in attempt("a.pdf")
    log = (folder / "log.csv").read_text()
    for text in ("", log.splitlines()[0] + "\n", log + "x,y\n"):
        (folder / "log.csv").write_text(text)
        assert "run.json or log.csv is damaged" in attempt()
    (folder / "log.csv").write_text(log)
    for key in ("metrics", "settings"):
        (folder / "run.json").write_text(json.dumps({**result, key: None}))
        assert "run.json or log.csv is damaged" in attempt()
    (folder / "run.json").unlink()
    assert "holds no run.json" in attempt()
