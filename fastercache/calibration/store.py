"""What a calibration has found so far, on disk: an interrupted one goes on from there, and the same findings give the
same schedule."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastercache.calibration.capture import Reference
from fastercache.calibration.clips import Example
from fastercache.errors import CalibrationError

IDENTITY = "calibration.json"


class Store:
    """A folder, or nothing at all (`None`), in which case nothing is kept.

    identity: all that findings depend on; a folder of another calibration is refused. saved: the seconds that it took
    to find what was found before and is read now.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        self.folder = folder
        self.saved = 0.0
        if folder is None:
            return
        text = json.dumps(identity, indent=1, sort_keys=True, default=str)
        known = folder / IDENTITY
        if known.exists() and known.read_text() != text:
            before = json.loads(known.read_text())
            names = [name for name in identity if json.loads(text)[name] != before.get(name)]
            raise CalibrationError(
                f"{folder} holds another calibration, with other {' and '.join(names) or 'settings'}; give another "
                "folder, or remove this one to begin again"
            )
        self._write(known, text.encode())

    def found(self, name: str, find: Callable[[], Any]) -> Any:
        """Plain data by name: what is stored, or what `find` gives, which is stored then."""
        if self.folder is None:
            return find()
        path = self.folder / f"{name}.json"
        if path.exists():
            stored = json.loads(path.read_text())
            self.saved += stored["seconds"]
            return stored["found"]
        start = time.perf_counter()
        value = find()
        text = json.dumps({"seconds": time.perf_counter() - start, "found": value}, indent=1)
        self._write(path, text.encode())
        return json.loads(text)["found"]

    def reference(self, example: Example, make: Callable[[Example], Reference]) -> Reference:
        """An uncached generation: the stored one, or a new one, which is stored then."""
        if self.folder is None:
            return make(example)
        path = self.folder / f"uncached-{digest(example.key)}.npz"
        if path.exists():
            reference = _loaded(path, example)
            self.saved += reference.seconds
            return reference
        reference = make(example)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            latents=_bytes(reference.latents),
            guided=_bytes(reference.guided),
            clip=reference.clip,
            products=reference.products,
            weights=reference.weights,
            response=reference.response,
            facts=json.dumps(
                {"example": example.key, "experts": reference.experts, "seconds": reference.seconds}
                | {name: [list(one.shape), str(one.dtype)[6:]] for name, one in _tensors(reference).items()}
            ),
        )
        self._write(path, buffer.getvalue())
        return reference

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all."""
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CalibrationError(
                f"{path} cannot be written: {error}; make room or give another folder. What was captured before is "
                f"kept in {path.parent}, and the same command goes on from there"
            ) from error


def _tensors(reference: Reference) -> dict[str, torch.Tensor]:
    return {"latents": reference.latents, "guided": reference.guided}


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def _loaded(path: Path, example: Example) -> Reference:
    try:
        with np.load(path) as stored:
            facts = json.loads(str(stored["facts"]))

            def tensor(name: str) -> torch.Tensor:
                shape, dtype = facts[name]
                return torch.from_numpy(stored[name]).view(getattr(torch, dtype)).view(shape)

            return Reference(
                example,
                tensor("latents"),
                tensor("guided"),
                stored["clip"],
                stored["products"],
                stored["weights"],
                stored["response"],
                tuple(facts["experts"]),
                facts["seconds"],
            )
    except Exception as error:  # whatever a damaged archive makes NumPy raise
        raise CalibrationError(f"{path} cannot be read: {error}; remove it, and it is made again") from error


def digest(*parts: Sequence[Any] | Any) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]
