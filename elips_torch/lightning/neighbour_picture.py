"""A picture of queries and what they found, made of pictures."""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
# Of the query, of what is relevant, of what is not, of a place that nothing fills.
QUERY, RIGHT, WRONG, EMPTY = (110, 110, 110), (40, 160, 70), (210, 60, 50), (255, 255, 255)
_FRAME, _GAP = 3, 4
_LARGEST_SIDE = 128


def as_picture(payload: Any) -> Tensor | None:
    """Return a picture as uint8 ``(3, H, W)``, or None for what is none.

    Args:
        payload: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``, as a tensor or an array, uint8 or floating in
            [0, 1]; an array may be ``(H, W, 3)`` too; a PIL picture; or the path of a picture, which is read
            where pillow is installed.
    """
    if isinstance(payload, os.PathLike):
        payload = _read(Path(payload))
    if hasattr(payload, "convert") and hasattr(payload, "getbands"):
        payload = np.asarray(payload.convert("RGB"))
    if isinstance(payload, np.ndarray):
        if payload.ndim == 3 and payload.shape[2] in (1, 3) and payload.shape[0] not in (1, 3):
            payload = payload.transpose(2, 0, 1)
        payload = torch.from_numpy(np.array(payload))
    if not isinstance(payload, Tensor):
        return None
    picture = payload.detach().cpu()
    if picture.ndim == 2:
        picture = picture[None]
    if picture.ndim != 3 or picture.shape[0] not in (1, 3) or not picture.numel():
        return None
    if picture.is_floating_point():
        picture = picture.float().nan_to_num().clamp(0, 1).mul(255).round()
    return picture.to(torch.uint8).expand(3, -1, -1)


def grid(rows: Sequence[Sequence[tuple[Tensor | None, tuple[int, int, int]]]]) -> Tensor:
    """Return one picture, uint8 ``(3, H, W)``, of framed pictures in rows.

    Args:
        rows: equally long; each picture uint8 ``(3, h, w)`` or None, with the colour of its frame.
    """
    shown = [picture for row in rows for picture, _ in row if picture is not None]
    height = max((picture.shape[1] for picture in shown), default=1)
    width = max((picture.shape[2] for picture in shown), default=1)
    # Small ones are enlarged so that they can be seen, large ones fit on a screen.
    scale = _LARGEST_SIDE / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    cell_height, cell_width = height + 2 * _FRAME + _GAP, width + 2 * _FRAME + _GAP
    whole = torch.full((3, len(rows) * cell_height, len(rows[0]) * cell_width), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, (picture, colour) in enumerate(row):
            cell = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(
                1, height + 2 * _FRAME, width + 2 * _FRAME
            )
            inside = cell[:, _FRAME : _FRAME + height, _FRAME : _FRAME + width]
            if picture is None:
                inside.fill_(255)
            else:
                inside.copy_(functional.interpolate(picture[None], size=(height, width))[0])
            top, left = i * cell_height, j * cell_width
            whole[:, top : top + cell.shape[1], left : left + cell.shape[2]] = cell
    return whole


def png(picture: Tensor) -> bytes:
    r"""Return the file of a picture, uint8 ``(3, H, W)``.

    As in the PNG specification (ISO/IEC 15948), with no filter and one chunk of data.

    >>> png(torch.zeros(3, 1, 1, dtype=torch.uint8))[:4]
    b'\x89PNG'
    """
    _, height, width = picture.shape
    lines = picture.permute(1, 2, 0).reshape(height, 3 * width).numpy()
    # Each line begins with the number of its filter.
    raw = np.concatenate([np.zeros((height, 1), dtype=np.uint8), lines], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _read(path: Path) -> Any:
    """Return the PIL picture that a path leads to, None for what is none or cannot be read."""
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        return None
    try:
        from PIL import Image
    except ImportError:
        return None
    with Image.open(path) as picture:
        return picture.convert("RGB")
