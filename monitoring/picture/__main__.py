"""The dashboard with a Prometheus' data as a PNG: `python -m monitoring.picture http://prometheus:9090 grafana.png --minutes 10`.

Drawn by Grafana's own components (@grafana/ui from npm), without a Grafana. Needs node, npm and chromium (CHROMIUM: another).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from monitoring import DASHBOARD, check

HERE = Path(__file__).parent
BUNDLE = [
    "npx",
    "esbuild",
    "picture.jsx",
    "--bundle",
    "--minify",
    "--outfile=picture.js",
    "--loader:.ttf=dataurl",
    "--loader:.woff2=dataurl",
]
WIDTH, CELL = 1584, 38
"""Pixels: of the page; of one row of Grafana's grid, as picture.jsx has them."""


def legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), text)


def data(url: str, seconds: int, interval: str) -> dict[str, Any]:
    """What picture.jsx draws. Raises OSError when Prometheus isn't there."""
    to = time.time()
    answers: dict[int, list[dict[str, Any]]] = {}
    for answer in check.check(url, seconds, interval):
        for series in answer.series:
            values = [[at, float(value)] for at, value in series["values"] if value not in ("NaN", "+Inf", "-Inf")]
            if values:
                answers.setdefault(answer.query.panel_id, []).append(
                    {"legend": legend(answer.query.legend, series["metric"]), "values": values}
                )
    dashboard = json.loads(DASHBOARD.read_text())
    return {"dashboard": dashboard, "answers": answers, "from": to - seconds, "to": to, "step": check.step(seconds)}


def draw(work: Path, picture: dict[str, Any], output: Path) -> None:
    """Bundle (once a directory) and take the screenshot. Raises CalledProcessError."""
    for name in ("package.json", "picture.jsx", "picture.html"):
        shutil.copy(HERE / name, work)
    (work / "data.js").write_text(f"window.PICTURE = {json.dumps(picture)}")
    if not (work / "node_modules").is_dir():
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--legacy-peer-deps", "--ignore-scripts"], cwd=work, check=True
        )
    subprocess.run([*BUNDLE, '--define:process.env.NODE_ENV="production"'], cwd=work, check=True)
    height = max(place["y"] + place["h"] for place in (panel["gridPos"] for panel in picture["dashboard"]["panels"])) * CELL + 24
    chromium = [os.environ.get("CHROMIUM", "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    chromium += [f"--window-size={WIDTH},{height}", "--virtual-time-budget=10000", f"--screenshot={output.resolve()}"]
    subprocess.run([*chromium, (work / "picture.html").as_uri()], check=True, stderr=subprocess.DEVNULL)
    with Image.open(output) as image:  # of few colours as it is: a third of the size
        image.convert("RGB").quantize(256).save(output, optimize=True)


def main() -> int:
    parser = check.parser_of("monitoring.picture", "The dashboard as a PNG.")
    parser.add_argument("output", type=Path, help="the PNG")
    parser.add_argument("--work", type=Path, help="keeps the npm packages for the next time (600 MB)")
    args = parser.parse_args()
    try:
        picture = data(args.url.rstrip("/"), args.minutes * 60, args.rate_interval)
    except OSError as error:
        print(f"{args.url}: {error}; is it Prometheus' address?", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        draw(work, picture, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
