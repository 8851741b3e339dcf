"""How the cost of a step grows with heads, rank and length: the last part of benchmark.py."""

import statistics
from pathlib import Path

HEADS, RANKS, LENGTHS = (1, 2, 4, 8, 16), (4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048)


def measure_growth(new_step, random_batch, clock, *, tokens, repeats):
    """{axis: {value: tokens/s}}: heads at rank 8, rank with 3 heads, both on 2 x tokens; length in
    batches of 2 x tokens positions, of one row where a row is longer than that."""
    points = {"heads": {n: (dict(heads=n, rank=8), (2, tokens)) for n in HEADS},
              "rank": {r: (dict(heads=3, rank=r), (2, tokens)) for r in RANKS},
              "length": {t: (dict(heads=3, rank=8), (max(1, 2 * tokens // t), t))
                         for t in LENGTHS}}
    found = {}
    for axis, settings in points.items():
        steps = {value: new_step(**layer) for value, (layer, _) in settings.items()}
        batches = {value: random_batch(*shape) for value, (_, shape) in settings.items()}
        speeds = {value: [] for value in settings}
        for turn in range(repeats + 1):
            for value, step in steps.items():
                started = clock()
                step(batches[value])
                if turn:
                    rows, length = settings[value][1]
                    speeds[value].append(rows * length / (clock() - started))
        found[axis] = {value: statistics.median(s) for value, s in speeds.items()}
        print(f"\n{axis:10}" + "".join(f"{value:8}" for value in found[axis]))
        print(f"{'tokens/s':10}" + "".join(f"{speed:8.0f}" for speed in found[axis].values()))
    return found


def draw_growth(growth, path, width=260, height=150):
    """The three curves side by side as an SVG picture, all on one scale that starts at zero."""
    top = 1.15 * max(max(axis.values()) for axis in growth.values())
    parts = []
    for panel, (axis, values) in enumerate(growth.items()):
        left = 45 + panel * (width + 25)
        places = [left + 15 + i * (width - 30) / (len(values) - 1) for i in range(len(values))]
        heights = [20 + height * (1 - speed / top) for speed in values.values()]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in zip(places, heights))
        parts += [f'<rect x="{left}" y="20" width="{width}" height="{height}" fill="none" '
                  'stroke="#999"/>',
                  f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="2"/>',
                  f'<text x="{left + width / 2:.0f}" y="{height + 52}">{axis}</text>']
        for x, y, (value, speed) in zip(places, heights, values.items()):
            parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="#2563eb"/>',
                      f'<text x="{x:.0f}" y="{y - 8:.0f}">{speed:.0f}</text>',
                      f'<text x="{x:.0f}" y="{height + 35}">{value}</text>']
    whole = 45 + len(growth) * (width + 25)
    middle = 20 + height / 2
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{height + 65}" '
           'font-family="sans-serif" font-size="11" text-anchor="middle">\n'
           '<rect width="100%" height="100%" fill="white"/>\n'
           f'<text x="20" y="{middle:.0f}" transform="rotate(-90 20 {middle:.0f})">'
           'tokens/s</text>\n'
           + "\n".join(parts) + "\n</svg>\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(svg, encoding="utf-8")
