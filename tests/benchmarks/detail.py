"""What tiles and the tower's tokens give: `python -m tests.benchmarks.detail {pages,emoji} [SETTING ...]`.

pages: recipes/pages.yaml, numbers on pages that are larger than the tower's input, with more and more tiles,
with and without a perceiver of 64 latents. emoji: recipes/emoji.yaml with each switch of the tower's tokens.
Each setting is trained on the same number of samples from several seeds and evaluated on the held-out ones.
Prints a row per setting, as `tests.benchmarks.new_bridge` does. `--with` adds overrides to all of them.
"""

from __future__ import annotations

import argparse

from tests.benchmarks.new_bridge import results, row

LATENTS = "model.perceiver={num_latents: 64, depth: 2, heads: 4, dim_head: 32}"
# Grids of 1 x 2, 2 x 3 and 2 x 4 tiles show half, three quarters and all of a page's resolution.
TILES = {count: f"data.tiles={{max: {count}}}" for count in (2, 6, 8)}
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "pages": {
        "one view": ("data.tiles=null",),
        "2 tiles": (TILES[2],),
        "6 tiles": (TILES[6],),
        "8 tiles": (TILES[8],),
        "one view, 64 latents": ("data.tiles=null", LATENTS),
        "2 tiles, 64 latents": (TILES[2], LATENTS),
        "6 tiles, 64 latents": (TILES[6], LATENTS),
        "8 tiles, 64 latents": (TILES[8], LATENTS),
        "8 tiles, no thumbnail": ("data.tiles={max: 8, thumbnail: false}",),
        "8 tiles, text tags": ("data.tiles={max: 8, tags: text}",),
        "8 tiles, no tags": ("data.tiles={max: 8, tags: none}",),
    },
    "emoji": {
        "default": (),
        "layer -2": ("model.vision.layer=-2",),
        "256 pixels": ("model.vision.image_size=256",),
        "256 pixels, pixel shuffle": ("model.vision.image_size=256", "model.vision.pixel_shuffle=true"),
        "64 latents": ("model.perceiver={num_latents: 64, depth: 6}",),
        "4 tiles of the enlarged drawing": ("data.tiles={max: 4, size: 32}",),
    },
}
STEPS = {"pages": 300, "emoji": 120}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", choices=SETTINGS)
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--with", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings, steps = SETTINGS[arguments.recipe], arguments.steps or STEPS[arguments.recipe]
    if unknown := [name for name in arguments.settings if name not in settings]:
        parser.error(f"no setting {unknown[0]!r}; use one of: {', '.join(settings)}")
    for name in arguments.settings or settings:
        overrides = (*arguments.overrides, *settings[name])
        scores = [*results(arguments.recipe, overrides, steps, arguments.seeds)]
        print(f"| {name} | {row(scores)} |", flush=True)


if __name__ == "__main__":
    main()
