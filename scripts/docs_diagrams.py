"""Draw the diagrams of the documentation: python scripts/docs_diagrams.py writes docs/assets/*.svg.

All text is in filled boxes, so that a diagram is readable on light and dark pages; it is narrow enough for a phone.
"""

from html import escape
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
WIDTH, LINE, PADDING = 420, 17, 10
COLORS = {  # fill, border, text
    "step": ("#e8eaf6", "#5c6bc0", "#1a237e"),
    "data": ("#e0f2f1", "#26867b", "#004d40"),
    "good": ("#e3f3e6", "#388e3c", "#1b4d20"),
    "wait": ("#fff3e0", "#d9822b", "#6b3a00"),
    "bad": ("#fdecea", "#c6453d", "#7a1410"),
}
STYLE = (
    "text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; text-anchor: middle } "
    ".title { font-weight: 600; font-size: 14px } .arrow { fill: none; stroke: #8a94a6; stroke-width: 2 }"
)
TITLE = ' class="title"'
HEAD = (
    '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#8a94a6"/></marker></defs>'
)


def box(x: int, y: int, width: int, kind: str, text: str) -> str:
    """Return a box with its upper left corner at (x, y), with lines divided by |, the first a title."""
    fill, border, color = COLORS[kind]
    shape = f'x="{x}" y="{y}" width="{width}" height="{2 * PADDING + LINE * (text.count("|") + 1)}" rx="8"'
    rows = [
        f'<text x="{x + width // 2}" y="{y + PADDING + 13 + LINE * i}" fill="{color}"'
        f"{TITLE if i == 0 else ''}>{escape(line)}</text>"
        for i, line in enumerate(text.split("|"))
    ]
    return f'<rect {shape} fill="{fill}" stroke="{border}" stroke-width="1.5"/>' + "".join(rows)


def arrow(*points: tuple[int, int]) -> str:
    """Return a line through the points, with a head at its end."""
    path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(points))
    return f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def svg(title: str, bottom: int, *parts: str) -> str:
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" role="img">'
    return "\n".join([opening, f"<title>{title}</title><style>{STYLE}</style>{HEAD}", *parts, "</svg>\n"])


def study() -> str:
    """The life of a study: plan, looks, verdicts."""
    return svg(
        "How a study runs",
        532,
        box(70, 2, 280, "data", "Study file|arms, seeds, looks, margin"),
        arrow((210, 56), (210, 76)),
        box(70, 78, 280, "step", "Plan|hash and time, appended to plan.jsonl|before any run"),
        arrow((210, 149), (210, 169)),
        box(70, 171, 280, "step", "Run|all open arms, up to the next look|for example: 3, then 5, 8, 12 seeds"),
        arrow((210, 242), (210, 262)),
        box(70, 264, 280, "step", "Look|test each open arm against the baseline"),
        arrow((140, 318), (70, 350)),
        arrow((210, 318), (210, 350)),
        arrow((280, 318), (340, 350)),
        box(4, 352, 132, "good", "Decided|better, worse or|equivalent: stop"),
        box(146, 352, 128, "bad", "Hopeless|inconclusive:|stop early"),
        box(284, 352, 132, "wait", "Open|to the next look,|if there is one"),
        arrow((398, 352), (398, 206), (352, 206)),
        arrow((70, 423), (150, 458)),
        arrow((210, 423), (210, 458)),
        box(70, 460, 280, "data", "Report|differences, intervals and one verdict|per arm"),
    )


def batches() -> str:
    """From the order of an epoch to a batch on the device."""
    return svg(
        "Where a batch comes from",
        551,
        box(60, 2, 300, "data", "(seed, epoch)"),
        arrow((210, 39), (210, 59)),
        box(60, 61, 300, "step", "Order|permutation of the training images,|a pure function"),
        arrow((210, 132), (210, 152)),
        box(50, 154, 320, "step", "Sampler (main process)|batch b: images b·B to (b+1)·B,|divided among ranks"),
        arrow((140, 225), (105, 249)),
        arrow((280, 225), (315, 249)),
        box(4, 251, 200, "step", "Data in memory|index the uint8 array"),
        box(216, 251, 200, "step", "Image files (workers)|decode, crop, resize to uint8"),
        arrow((105, 305), (140, 329)),
        arrow((315, 305), (280, 329)),
        box(60, 331, 300, "data", "uint8 batch (N, H, W, C)|copied to the device one batch ahead"),
        arrow((210, 385), (210, 405)),
        box(60, 407, 300, "step", "On the device|flip, cutout, normalize, mixup:|parameters from (seed, epoch, image)"),
        arrow((210, 478), (210, 494)),
        box(60, 496, 300, "good", "Network|float images (N, C, H, W)"),
    )


def run() -> str:
    """The life of a run: checks, training, resume, test."""
    return svg(
        "The life of a run",
        522,
        box(60, 2, 240, "data", "reslab fit|config, data"),
        arrow((180, 56), (180, 76)),
        box(60, 78, 240, "step", "Check|config, data, network, optimizer|before the first step"),
        arrow((300, 113), (328, 113)),
        box(330, 86, 86, "bad", "Error|status 2"),
        arrow((180, 149), (180, 169)),
        box(60, 171, 240, "step", "Newest intact checkpoint?|load it and continue at its step,|else start at step 0"),
        arrow((180, 242), (180, 262)),
        box(60, 264, 240, "step", "Train|a checkpoint every 5 minutes,|written atomically, with SHA-256"),
        arrow((300, 299), (328, 299)),
        box(330, 272, 86, "bad", "Diverged|status 1"),
        arrow((130, 335), (105, 367)),
        arrow((240, 335), (290, 367)),
        box(26, 369, 164, "wait", "Signal or Ctrl-C|checkpoint, status 75"),
        arrow((108, 423), (108, 447)),
        box(26, 449, 164, "wait", "Run it again|the same command:|the same bits"),
        arrow((26, 484), (10, 484), (10, 206), (58, 206)),
        box(206, 369, 210, "step", "Test once|with run.test_weights"),
        arrow((311, 423), (311, 447)),
        box(206, 449, 210, "good", "Complete|weights, predictions, report|status 0"),
    )


def main() -> None:
    for drawing in (study, batches, run):
        (ASSETS / f"{drawing.__name__}.svg").write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    main()
