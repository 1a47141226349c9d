"""The part of COCO whose pictures may be shown and changed by anybody who names their authors, as a COCO of its own.

    python benchmarks/free_coco.py COCO FOLDER

Most of COCO's photographs are for non-commercial use, or must not be changed. A model that was trained on few pictures
draws them again, so of what it draws only that of free pictures is published. FOLDER gets the caption files with these
alone, links to the folders of images, and SOURCES.md, which says where each picture is from.
Prints how many pictures, captions and words are left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import words_of

FREE = {
    4: "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/)",
    5: "[CC BY-SA 2.0](https://creativecommons.org/licenses/by-sa/2.0/)",
    7: "no known copyright restrictions",
    8: "United States Government work",
}
"""COCO's numbers of such licences, as its caption files have them."""

SOURCES = """# Where the photographs are from

From [COCO](https://cocodataset.org), which has them from Flickr; the pages name their authors. What a model draws that
was trained on so few of them may be nearly a copy of one: cropped, scaled and redrawn, and under its licence.

| picture | licence | page |
| --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, metavar="COCO", help="a folder with annotations/ and the image folders")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    args = parser.parse_args()
    (args.folder / "annotations").mkdir(parents=True)
    sources = SOURCES
    for file in sorted((args.coco / "annotations").glob("captions_*.json")):
        content = json.loads(file.read_text())
        images = [image for image in content["images"] if image["license"] in FREE]
        known = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in known]
        free = {**content, "images": images, "annotations": annotations}
        (args.folder / "annotations" / file.name).write_text(json.dumps(free))
        name = file.stem.removeprefix("captions_")
        (args.folder / name).symlink_to((args.coco / name).absolute())
        for image in images:
            page = f"https://www.flickr.com/photo.gne?id={image['flickr_url'].split('/')[-1].split('_')[0]}"
            sources += f"| {name}/{image['file_name']} | {FREE[image['license']]} | {page} |\n"
        print(
            f"{file.name}: {len(images)} of {len(content['images'])} pictures, {len(annotations)} captions, "
            f"{words_of(a['caption'] for a in annotations)}"
        )
    (args.folder / "SOURCES.md").write_text(sources)


if __name__ == "__main__":
    main()
