"""A network that `torch.export.save` wrote: the archive's folder holds it, and the checkpoint only says which file it is."""

from __future__ import annotations

from pathlib import Path

from skewless.core.definition import Definition
from skewless.importers.errors import ImportFileError
from skewless.importers.imported_file import ImportedFile
from skewless.training.checkpoint import file_digest


def read_exported(path: str | Path, definition: Definition) -> ImportedFile:
    """The `.pt2` file as an import without weights.

    Raises ImportFileError unless the definition's network is `{exported: FILE.pt2}` and the archive's folder has this
    very file under that name.
    """
    path = Path(path)
    if not definition.network_files:
        raise ImportFileError(
            f"{path} is an exported network, and {definition.folder / 'model.yaml'} has the network {definition.network}; copy "
            f"the file into the folder and write network: {{exported: {path.name}}}"
        )
    (name,) = definition.network_files
    inside = definition.folder / name
    if not inside.is_file():
        raise ImportFileError(f"there is no {inside}, which model.yaml names as the network; copy {path} there")
    digest = file_digest(path)
    if file_digest(inside) != digest:
        raise ImportFileError(
            f"{inside}, the archive's network, is not the same file as {path}; copy the right one there"
        )
    note = "the file does not say what its network was trained behind"
    return ImportedFile("exported", digest, notes=(note,))
