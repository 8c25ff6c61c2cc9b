"""python -m lab.record: copies the notebooks of the last headless run to the repository.

It keeps the outputs and removes what belongs to one run: papermill's metadata and parameters.
"""

import sys
from pathlib import Path

import nbformat

from lab.runs import NOTEBOOKS

HOME = Path(__file__).resolve().parent.parent
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def cleaned(book):
    """Removes papermill's metadata and injected parameters, and renumbers the cells."""
    cells = []
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else None
            if "metadata" in output:
                output.metadata = {}
        cells.append(cell)
    book.cells, book.metadata = cells, {**KEPT, "language_info": {"name": "python"}}
    count = 0
    for cell in book.cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    return book


def main(root=HOME):
    for name in NOTEBOOKS.values():
        book = nbformat.read(Path(root) / "model" / "notebooks" / name, as_version=4)
        nbformat.write(cleaned(book), HOME / name)
        print("recorded", name)


if __name__ == "__main__":
    main(*sys.argv[1:])
