"""Execute the notebooks and write them with their outputs; or check that what is committed agrees with the sources.

    python notebooks/build.py [NAME ...]     execute NAME.py (default: all) and write NAME.ipynb, here or --to FOLDER
    python notebooks/build.py --check        execute nothing; fail if an .ipynb is missing or its inputs differ

The sources are jupytext's percent format. Outputs carry no widget state, no times of execution and no random ids.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
FAINTEST = 0.1  # of 255: the mean error of a picture's colours that is no matter
LONGEST = 600  # seconds a cell may take before the build gives up


def sources() -> list[Path]:
    """The numbered notebooks' sources, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(source: Path) -> Any:
    """The source as a notebook without outputs, its cells named by their number."""
    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem[:2]}-{i:03}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return notebook


def execute(source: Path) -> Any:
    """The notebook with its outputs. Raises CellExecutionError at the first cell that fails."""
    notebook = read(source)
    NotebookClient(
        notebook,
        timeout=LONGEST,
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
    ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [
                _tidy(output) for output in cell.outputs if WIDGET not in output.get("data", {})
            ]
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    return notebook


def _tidy(output: Any) -> Any:
    """Pictures in 256 colours where nobody can see it: charts have more only along their antialiased lines."""
    if "image/png" in output.get("data", {}):
        with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as image:
            flat = image.convert("RGB")  # the background is white: nothing shows through
        few = flat.quantize(256, dither=Image.Dither.NONE)
        error = np.abs(np.asarray(few.convert("RGB"), float) - np.asarray(flat, float)).mean()
        data = io.BytesIO()
        (few if error < FAINTEST else flat).save(data, "png", optimize=True)
        output.data["image/png"] = base64.b64encode(data.getvalue()).decode()
    return output


def differences(source: Path) -> str | None:
    """Why the committed .ipynb does not belong to its source, or None."""
    target = source.with_suffix(".ipynb")
    if not target.is_file():
        return f"{target.name} is missing"
    built, wanted = nbformat.read(target, as_version=4), read(source)
    inputs = [
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (built, wanted)
    ]
    if inputs[0] != inputs[1]:
        return f"the cells of {target.name} are not those of {source.name}"
    if "widgets" in built.metadata:
        return f"{target.name} holds widget state"
    if any(o.output_type == "error" for cell in built.cells for o in cell.get("outputs", [])):
        return f"{target.name} holds an error"
    return None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="such as 01_forward_process, or its first letters",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only compare the committed notebooks with their sources",
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=HERE,
        metavar="FOLDER",
        help="where to write (default: beside the sources)",
    )
    args = parser.parse_args()
    chosen = [
        s
        for s in sources()
        if not args.names or any(s.stem.startswith(Path(n).stem) for n in args.names)
    ]
    if not chosen:
        parser.error(
            f"no notebook is called {' or '.join(args.names)}; there are: {', '.join(s.stem for s in sources())}"
        )
    if args.check:
        faults = [fault for s in chosen if (fault := differences(s))]
        print("\n".join(faults) or f"{len(chosen)} notebooks agree with their sources")
        return bool(faults)
    os.environ.update(
        MINIDIFF_NOTEBOOK_BUILD="1", TQDM_DISABLE="1"
    )  # bars tell of times, which differ
    for s in chosen:
        since = time.perf_counter()
        try:
            notebook = execute(s)
        except CellExecutionError as e:
            print(f"{s.stem}: a cell failed\n{e}", file=sys.stderr)
            return 1
        target = args.to / f"{s.stem}.ipynb"
        nbformat.write(notebook, target)
        print(
            f"{s.stem}: {time.perf_counter() - since:.0f} s, {target.stat().st_size / 1e6:.2f} MB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
