"""A folder of captioned pictures to train on: a font's emoji, with their names in Unicode as captions.

    python benchmarks/emoji_pictures.py FOLDER [--font NotoColorEmoji.ttf]

The font is Google's Noto Color Emoji (SIL Open Font License 1.1), which Debian packages as fonts-noto-color-emoji.
Single characters alone are drawn, on white; flags, skin colours and what is put together of several are left out.
Prints how many pictures and words there are.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from pathlib import Path

from common import words_of
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZE = 109  # the only size that the font's bitmaps have
BLOCKS = [(0x203C, 0x3299), (0x1F004, 0x1F1E5), (0x1F200, 0x1FAFF)]
MODIFIERS = range(0x1F3FB, 0x1F400)  # skin colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--font", default=FONT)
    args = parser.parse_args()
    font = ImageFont.truetype(args.font, SIZE)
    nothing = drawn(font, "\N{LATIN SMALL LETTER A}")
    args.folder.mkdir(parents=True)
    captions = {}
    for number in (n for first, last in BLOCKS for n in range(first, last + 1)):
        name = unicodedata.name(chr(number), "")
        picture = drawn(font, chr(number)) if name and number not in MODIFIERS else None
        if picture is None or picture.getcolors(2) or picture == nothing:
            continue
        file = f"{number:x}.png"
        picture.save(args.folder / file)
        captions[file] = name.lower().replace("-", " ")
    lines = [json.dumps({"file_name": file, "text": caption}) + "\n" for file, caption in captions.items()]
    (args.folder / "metadata.jsonl").write_text("".join(lines))
    print(f"{len(captions)} pictures, {words_of(captions.values())}")


def drawn(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    image = Image.new("RGB", (136, 136), "white")
    ImageDraw.Draw(image).text((68, 68), text, font=font, embedded_color=True, anchor="mm")
    return image


if __name__ == "__main__":
    main()
