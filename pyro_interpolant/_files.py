r"""Files on the disk: tensors and text in safetensors, with a checksum, complete or not there.

What flows, runs and long evaluations keep is written here; what it says is theirs. Reading needs
numpy alone.
"""

import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError, deserialize

if TYPE_CHECKING:
    from torch import Tensor

StrPath = str | os.PathLike[str]
_Array = TypeVar("_Array")

CHECKSUM = "checksum"  # its name among a file's texts
PROBES = "divergence.probes"  # the name of a flow's, among the tensors of its file
# The most steps, and the most probes: the weights of so many steps take 0.3 s and 70 MB, and grow
# with the square of the steps.
MAX_COUNT = 4096

_STALE = 3600.0  # seconds without a byte after which nobody writes to a file any more
_NUMPY_NAMES = {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"} | {
    f"{letter}{bits}": f"{kind}{bits}"
    for letter, kind, sizes in (
        ("F", "float", (16, 32, 64)),
        ("I", "int", (8, 16, 32, 64)),
        ("U", "uint", (8, 16, 32, 64)),
    )
    for bits in sizes
}


def contents(
    path: StrPath, *, framework: Literal["np", "pt"] = "np"
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the texts and the tensors, of any shapes, of a file that :func:`write` wrote.

    Args:
        path: The file.
        framework: Whether tensors are numpy's or torch's.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is damaged, or not of safetensors.
    """
    return contents_of(Path(path).read_bytes(), path, framework=framework)


def contents_of(
    raw: bytes, path: StrPath, *, framework: Literal["np", "pt"] = "np"
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the texts and the tensors, of any shapes, that the bytes of a file hold.

    Tensors come from the very bytes that the checksum is of, whatever happens to the file.

    Args:
        raw: The bytes.
        path: The file, named in errors.
        framework: Whether tensors are numpy's or torch's.

    Raises:
        ValueError: If the file is damaged, or not of safetensors.
    """
    try:
        head, start = _parsed(raw)
        metadata = head.get("__metadata__", {})
        claimed = metadata.get(CHECKSUM)
        if claimed is not None and claimed != _checksum(head, memoryview(raw)[start:]):
            raise ValueError("its checksum is another")
        return metadata, _tensors(raw, framework)
    except TypeError as error:
        raise ValueError(
            f"expected tensors of types that numpy has, got others in {path} ({error}): save the "
            "flow in float32 or float64"
        ) from error
    except (SafetensorError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}): save it again"
        ) from error


def write(
    path: StrPath,
    tensors: "Mapping[str, Tensor]",
    metadata: Mapping[str, str],
    *,
    previous: Path | None = None,
) -> None:
    """Write tensors, of any shapes, and text; a file is replaced by a finished one or not at all.

    Several processes may write one file at once: it is that of the last, complete.

    Args:
        path: The file, or a symbolic link to it.
        tensors: Tensors by name, which do not share memory.
        metadata: Text by name.
        previous: Where to keep the file that is replaced, or None to drop it.

    Raises:
        ValueError: If a tensor is of a type that no such file has.
        OSError: If the file cannot be written; what was there is then untouched.
    """
    from safetensors.torch import save as serialized

    try:
        head, body = _with_checksum(serialized(dict(tensors), dict(metadata)))
    except (SafetensorError, LookupError, RuntimeError) as error:
        raise ValueError(f"expected tensors that safetensors can hold, got {error}") from error
    path = Path(os.path.realpath(path))
    mode = _mode_of(path)
    # A name of its own: another process that writes the same file neither sees nor removes it.
    scratch = path.with_name(f".{_short(path)}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        # As any new file, the umask taken off, or with the mode of what it replaces.
        with open(scratch, "xb", opener=partial(os.open, mode=mode or 0o666)) as file:
            if mode is not None:
                os.chmod(scratch, mode)
            file.write(head)
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and mode is not None:
            with suppress(FileNotFoundError):  # another process has just done so
                os.replace(path, previous)
        os.replace(scratch, path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # known to who called; of a full disk there is none
        raise
    _remove_stale(path)


def checksum(tensors: "Iterable[Tensor | None]", text: str = "") -> int:
    """Return a checksum of a text and the bytes of tensors of any shapes."""
    import torch

    value = zlib.crc32(text.encode())
    for tensor in tensors:
        if tensor is not None:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            value = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), value)
    return value


def below(prefix: str, tensors: Mapping[str, _Array]) -> dict[str, _Array]:
    """Return the tensors, of any shapes, whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def plain_number(value: Any) -> Any:
    """Return a number of numpy's or torch's, which JSON does not know, as one of Python's.

    Raises:
        ValueError: If it is none.
    """
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise ValueError(f"expected parts made of numbers and text, got a {type(value).__name__}")


def refuse_no_place(path: StrPath) -> None:
    """Raise a ValueError where no checkpoint can be kept: in no folder, in place of no file."""
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir() or (real.exists() and not real.is_file()):
        raise ValueError(f"expected a checkpoint, a file in a folder that is there, got {path}")


def _mode_of(path: Path) -> int | None:
    """Return the mode of a file that may be replaced; None if there is none."""
    try:
        handle = os.open(path, os.O_RDWR)  # an error where it must not be written
    except FileNotFoundError:
        return None
    mode = os.fstat(handle).st_mode
    os.close(handle)
    if not stat.S_ISREG(mode):
        raise OSError(f"expected a file to replace, got {path}, which is something else")
    return stat.S_IMODE(mode)


def _short(path: Path) -> str:
    """Return the name of a file, or of a long one a number, to which more can be added."""
    name = os.fsencode(path.name)
    return path.name if len(name) < 200 else f"{zlib.crc32(name):08x}"


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left of writes to a file.

    They are known by their age beside the file just written. Their process may be of another
    machine, so it is not looked for.
    """
    names = re.compile(rf"\.{re.escape(_short(path))}(\.\d+\.[0-9a-f]{{8}})?\.partial")
    # The file itself is written; and another process may be first.
    with suppress(OSError), os.scandir(path.parent) as entries:
        written = path.stat().st_mtime
        for entry in entries:
            if names.fullmatch(entry.name) and entry.stat().st_mtime < written - _STALE:
                os.unlink(entry)


def _tensors(raw: bytes, framework: Literal["np", "pt"]) -> dict[str, Any]:
    """Return the tensors in the bytes of a safetensors file, as arrays of their own.

    They are copied, for sums may depend on how numbers are aligned. Each is dropped once copied:
    beside the bytes, memory holds the tensors once, and the largest twice.
    """
    tensors: dict[str, Any] = {}
    if framework == "pt":
        from safetensors.torch import load

        found = load(raw)
        for name in sorted(found):
            tensors[name] = found.pop(name).clone()
        return tensors
    views = dict(deserialize(raw))
    for name in sorted(views):
        view = views.pop(name)
        dtype = np.dtype(_NUMPY_NAMES.get(view["dtype"], view["dtype"]))
        tensors[name] = np.frombuffer(view["data"], dtype).reshape(view["shape"]).copy()
    return tensors


def _parsed(raw: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its tensors start.

    Raises:
        ValueError: If it has none.
    """
    start = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:start].decode())
    if not (isinstance(head, dict) and isinstance(head.get("__metadata__", {}), dict)):
        raise ValueError("it has no header")
    return head, start


def _checksum(head: dict[str, Any], body: memoryview) -> str:
    """Return the checksum of a file's tensors and of its header, save the checksum itself."""
    texts = {k: v for k, v in head.get("__metadata__", {}).items() if k != CHECKSUM}
    covered = json.dumps({**head, "__metadata__": texts}, sort_keys=True)
    return f"{zlib.crc32(body, zlib.crc32(covered.encode())):08x}"


def _with_checksum(raw: bytes) -> tuple[bytes, memoryview]:
    """Return the bytes of a safetensors file, checksum included, up to the tensors and of them."""
    head, start = _parsed(raw)
    body = memoryview(raw)[start:]
    head["__metadata__"][CHECKSUM] = _checksum(head, body)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text, body
