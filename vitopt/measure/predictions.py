"""Predictions per image: kept beside each record so that any two can be compared later."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitopt import storage
from vitopt.errors import RecordError

PREDICTIONS_FILE = "predictions.parquet"


@dataclass(frozen=True)
class Predictions:
    """Logits of one variant over one image set.

    `ids` and `image_sha256` name the images; `labels`: (images,); `logits`: (images, classes), float32.
    `groups` names the group of each image where images of one group depend on each other.
    """

    ids: tuple[str, ...]
    image_sha256: tuple[str, ...]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    groups: tuple[str, ...] | None = None

    @property
    def classes(self) -> NDArray[np.int64]:
        """(images,): the class of highest logit, the lower index on ties."""
        return self.logits.argmax(axis=1)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(images,): whether the class is the label."""
        return self.classes == self.labels


def save_predictions(predictions: Predictions, folder: Path) -> None:
    """Write `predictions.parquet` into `folder`: image id, image hash, label, logits, and the group if there is one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = predictions.logits.shape[1]
    flat = pa.array(predictions.logits.reshape(-1))
    columns = {
        "image": list(predictions.ids),
        "image_sha256": list(predictions.image_sha256),
        "label": predictions.labels,
        "logits": pa.FixedSizeListArray.from_arrays(flat, classes),
    }
    if predictions.groups is not None:
        columns["group"] = list(predictions.groups)
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(folder / PREDICTIONS_FILE, buffer.getvalue())


def load_predictions(folder: Path) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        RecordError: missing or not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / PREDICTIONS_FILE
    try:
        table = pq.read_table(path)
        logits = table["logits"].combine_chunks()
        values = np.asarray(logits.values, dtype=np.float32).reshape(len(table), -1)
        return Predictions(
            ids=tuple(table["image"].to_pylist()),
            image_sha256=tuple(table["image_sha256"].to_pylist()),
            labels=np.asarray(table["label"], dtype=np.int64),
            logits=values,
            groups=tuple(table["group"].to_pylist()) if "group" in table.column_names else None,
        )
    except FileNotFoundError as error:
        raise RecordError(f"no predictions at {path}: evaluate with --output to keep them") from error
    except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as predictions: {error}") from error
