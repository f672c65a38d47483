"""Draws eval/architecture.svg, README's picture of the model:   python -m eval.architecture"""

import os

import musicinfuser as mi

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "architecture.svg")
WIDTH, HEIGHT = 920, 560
TEXT, VIDEO, MUSIC, LORA = "#dbe7f6", "#e9e4f5", "#fbe3cf", "#c8453b"
STYLE = "font-family: Helvetica, Arial, sans-serif; font-size: 15px; fill: #222"


def label(x, y, words, size=15, anchor="middle", colour="#222"):
    font = f'font-size="{size}" text-anchor="{anchor}" style="fill: {colour}; font-size: {size}px"'
    return f'<text x="{x}" y="{y}" {font}>{words}</text>'


def box(x, y, w, h, colour, *lines):
    """A box with lines of words in its middle."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{colour}" stroke="#555"/>'
    ]
    top = y + h / 2 - 9 * (len(lines) - 1) + 5
    parts += [label(x + w / 2, top + 18 * i, line) for i, line in enumerate(lines)]
    return "".join(parts)


def arrow(*points):
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#555" marker-end="url(#end)"/>'


def lora(x, y):
    """The mark of a low-rank update."""
    circle = f'<circle cx="{x}" cy="{y}" r="9" fill="{LORA}"/>'
    return circle + label(x, y + 4, "BA", 10, colour="#fff")


def inputs():
    yield box(40, 20, 200, 44, TEXT, "prompt: T5 tokens")
    yield box(300, 20, 260, 44, VIDEO, "x = (1 − σ) z + σ ε: patches")
    yield box(640, 20, 240, 44, MUSIC, "song: Wav2Vec 2.0 tokens")
    yield arrow((140, 64), (140, 124))
    yield arrow((430, 64), (430, 124))
    yield arrow((760, 64), (760, 84))
    yield box(640, 86, 240, 44, MUSIC, "projector, nearest in time:", "one token a latent frame")


def block():
    yield '<rect x="20" y="106" width="580" height="262" rx="10" fill="none" stroke="#999"/>'
    yield label(590, 360, "block l", 13, "end", "#777")
    words = "joint attention of all text and video tokens,", "modulated by σ and the pooled prompt"
    yield box(40, 126, 540, 66, "#f3f3f3", *words)
    yield box(40, 186, 540, 36, "#f3f3f3")
    for x, names in ((110, "qkv_y, proj_y"), (470, "qkv_x, proj_x")):
        yield lora(x - 50, 204)
        yield label(x - 34, 209, f"LoRA on {names}", 13, "start")
    for x, w, colour, words in ((60, 160, TEXT, "feed-forward"), (340, 180, VIDEO, "feed-forward")):
        yield arrow((x + w / 2, 222), (x + w / 2, 262))
        yield box(x, 264, w, 40, colour, words)
        yield arrow((x + w / 2, 304), (x + w / 2, 392))


def zica():
    yield box(640, 240, 240, 128, MUSIC)
    yield label(760, 268, "ZICA, after chosen blocks:")
    yield label(760, 292, "x + W_O softmax(QKᵀ/√d) V")
    yield label(760, 318, "Q of the video, K and V of the music", 13)
    yield label(760, 350, "W_O = 0 and B = 0 at first", 13, colour=LORA)
    yield arrow((760, 130), (760, 238))
    yield arrow((640, 330), (620, 330), (620, 380), (432, 380))


def layers():
    """The blocks of Mochi, those that the authors' adapter listens after in colour."""
    depth = mi.MODELS["mochi"]["depth"]
    size = (WIDTH - 80) / depth
    for i in range(depth):
        colour = "#f0a868" if i in mi.MUSICINFUSER_LAYERS else "#ddd"
        x = 40 + i * size
        yield f'<rect x="{x:.1f}" y="420" width="{size - 2:.1f}" height="26" fill="{colour}"/>'
        if i % 4 == 0 or i == depth - 1:
            yield label(f"{x + size / 2:.1f}", 462, i, 12)
    words = f"Mochi's {depth} blocks; the authors' adapter listens after "
    yield label(40, 410, f"{words}{len(mi.MUSICINFUSER_LAYERS)} of them", 13, "start")
    yield arrow((430, 470), (430, 500))
    yield box(250, 502, 360, 44, VIDEO, "velocity v, an estimate of z − ε")


def main():
    arrowhead = '<path d="M0,0 L8,4 L0,8 z" fill="#555"/>'
    marker = '<marker id="end" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{STYLE}">'
    )
    white = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    parts = [head, f"<defs>{marker}{arrowhead}</marker></defs>", white]
    for drawing in (inputs, block, zica, layers):
        parts += drawing()
    with mi.written_whole(PATH) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join([*parts, "</svg>"]) + "\n")
    print(PATH)


if __name__ == "__main__":
    mi.main(main)
