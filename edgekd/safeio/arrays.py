"""Named arrays <-> one .npz file: the same arrays give the same bytes, and no object is ever read back. And sparse matrices by rows."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import InputRefused
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_HEADER_BYTES = 10_000
# What zipfile says of a damaged archive; RuntimeError of an encrypted one, OSError where it seeks before the start.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Csr:
    """A sparse matrix by rows: the columns of row i are `indices[indptr[i]:indptr[i + 1]]`, and `values` lie beside them."""

    shape: tuple[int, int]
    indptr: NDArray[np.int64]  # (rows + 1,)
    indices: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def checked(cls, shape: tuple[int, int], indptr: NDArray[Any], indices: NDArray[Any], values: NDArray[Any]) -> Csr:
        """Raises ValueError, in words, for arrays that do not fit each other."""
        if any(a.ndim != 1 for a in (indptr, indices, values)) or any(a.dtype.kind not in "iu" for a in (indptr, indices)):
            raise ValueError("places in a sparse matrix that are not lists of whole numbers")
        start, places = indptr.astype(np.int64), indices.astype(np.int64)
        fits = (
            len(start) == shape[0] + 1
            and start[0] == 0
            and start[-1] == len(places) == len(values)
            and bool((np.diff(start) >= 0).all())
            and bool(((places >= 0) & (places < shape[1])).all())
        )
        if not fits:
            raise ValueError("a sparse matrix whose arrays do not fit each other")
        return cls(shape, start, places, values.astype(np.float32))

    def take(self, rows: NDArray[np.int64]) -> Csr:
        """These rows, in this order."""
        counts = self.indptr[rows + 1] - self.indptr[rows]
        indptr = np.concatenate([[0], counts.cumsum()])
        at = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], counts)
        return Csr((len(rows), self.shape[1]), indptr, self.indices[at], self.values[at])

    def dense(self) -> NDArray[np.float32]:
        """(rows, columns); entries that come twice are added."""
        found = np.zeros(self.shape, np.float32)
        np.add.at(found, (np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices), self.values)
        return found


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name; numpy's own savez puts the time of day into the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())


def read_arrays(path: Path, refused: type[InputRefused], *, expected: str, max_bytes: int, max_arrays: int) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz file from outside, by name. Raises `refused` for pickles, damage, and what unpacks to more than is allowed."""
    try:
        with resource_errors(path), zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sum(i.file_size for i in infos) > max_bytes or len(infos) > max_arrays:
                raise refused("it unpacks to too much", where=str(path), expected=f"at most {max_bytes} bytes in {max_arrays} arrays")
            return {i.filename.removesuffix(".npy"): _array(archive.read(i), i.filename, str(path), refused) for i in infos}
    except _DAMAGE as e:
        raise refused("it is not an .npz file, or it is damaged", where=str(path), expected=expected) from e


def read_safetensors(path: Path, refused: type[InputRefused], *, expected: str) -> dict[str, NDArray[Any]]:
    """Arrays of a .safetensors file from outside, by name; the format holds nothing but numbers. Raises `refused` for damage and for bfloat16."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        with resource_errors(path):
            return dict(load_file(path))
    except (SafetensorError, KeyError, TypeError, ValueError) as e:  # KeyError, TypeError: types that numpy does not have
        raise refused("it is not a .safetensors file that numpy can hold, or it is damaged", where=str(path), expected=expected) from e


def _array(data: bytes, name: str, where: str, refused: type[InputRefused]) -> NDArray[Any]:
    """One array of numbers or text; numpy's own reader would make room for what a header claims before it looks."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the array format")
    shape, fortran, dtype = read(stream, max_header_size=_MAX_HEADER_BYTES)
    if dtype.hasobject:
        raise refused(
            f"'{name}' holds pickled objects, which could run code; nothing of it was read",
            where=where,
            expected="arrays of numbers and text",
            hint="save text with np.array(..., dtype=str), numbers with their own type",
        )
    rest = data[stream.tell() :]
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"{name} is not as long as its header says")
    found: NDArray[Any] = np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
    return found
