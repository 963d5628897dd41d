"""Questions of benchmarks for tests: folders of images and lines, and sets that are read without a cache."""

import io
import json

from PIL import Image


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, lines, **images):
    """Writes a folder with these lines (dicts or raw texts) and images NAME.png of these shades."""
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    for name, shade in images.items():
        (folder / f"{name}.png").write_bytes(png(shade))
    return folder


def first_rows(benchmark, part, names):
    """Every question of some sets of a part, without a cache."""
    with benchmark.rows(part) as sets:
        return {name: [example for row in sets[name] for example in row] for name in names}
